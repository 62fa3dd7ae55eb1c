"""The comparison of conditional with dedicated networks: numbers, CSV, table, figures."""

import csv
import io
import json

import pytest
from rich.console import Console

from oat_dist import plots
from oat_dist.comparison import compare, print_comparison, write_comparison
from oat_dist.frontier import frontier_ratio, mean_points

ABOUT = {"model": "resnet8", "dataset": "digits", "split": "test", "num_examples": 180,
         "attack": {"name": "pgd-20", "norm": "linf", "eps": 8 / 255}}  # fmt: skip


def curve(*pairs, shift=0.0):
    lambdas = (0.0, 0.2, 1.0)
    return [{"lam": lam, "sa": sa + shift, "ra": ra} for lam, (sa, ra) in zip(lambdas, pairs, strict=True)]


DEDICATED = mean_points([curve((0.93, 0.0), (0.88, 0.40), (0.80, 0.50), shift=s) for s in (-0.01, 0.0, 0.01)])
OURS = [curve((0.92, 0.02), (0.87, 0.38), (0.82, 0.47), shift=s) for s in (0.0, 0.01)]


def test_a_comparison_has_the_mean_ratio_of_the_seeds_and_everything_beside_it():
    found = compare(DEDICATED, OURS)
    ours = found["conditional"]
    assert ours["ratios"] == [pytest.approx(frontier_ratio(c, DEDICATED)) for c in OURS]
    assert ours["ratio"] == pytest.approx(sum(ours["ratios"]) / 2) and ours["ratio_std"] > 0
    assert ours["gaps"][0]["sa_gap"] == pytest.approx(0.005)
    assert ours["monotonicity"] == {"sa": 1.0, "ra": 1.0} and ours["area_between"] > 0
    assert [c["ratio"] < 0.35 for c in found["controls"].values()] == [True, True]
    assert found["best_constant"]["lam"] == 0.2 and found["best_constant"]["ratio"] < 1
    itself = compare(DEDICATED, [[{k: p[k] for k in ("lam", "sa", "ra")} for p in DEDICATED]])["conditional"]
    assert itself["ratio"] == pytest.approx(1.0) and itself["area_between"] == pytest.approx(0.0)
    assert compare(DEDICATED)["conditional"] is None


def test_what_is_written_reads_back_and_names_every_network(tmp_path):
    found = compare(DEDICATED, OURS)
    paths = write_comparison(found, ABOUT, tmp_path / "test")
    assert [p.name for p in paths] == ["test.json", "test.csv", "test.png", "test.svg"]
    assert json.loads(paths[0].read_text())["conditional"]["ratio"] == found["conditional"]["ratio"]
    rows = list(csv.DictReader(paths[1].open()))
    assert len(rows) == 3 + 3 + 2 * 3
    (row,) = [r for r in rows if r["network"] == "conditional" and r["lambda"] == "0.2"]
    assert float(row["sa"]) == pytest.approx(0.875) and float(row["ra_gap"]) == pytest.approx(0.02)
    assert paths[2].read_bytes().startswith(b"\x89PNG") and "<svg" in paths[3].read_text()


def test_the_table_shows_deviations_gaps_and_the_controls():
    text = io.StringIO()
    print_comparison(compare(DEDICATED, OURS), ABOUT, Console(file=text, width=120))
    for expected in ("93.0 +- 1.0", "92.5 +- 0.7", "0.5 +- 0.8", "dedicated lambda = 1 at every lambda", "0.110"):
        assert expected in text.getvalue()


def with_intervals(points, half=0.03):
    bounds = [{f"{key}_ci": [p[key] - half, p[key] + half] for key in ("sa", "ra")} for p in points]
    return [point | interval for point, interval in zip(points, bounds, strict=True)]


def test_intervals_over_images_stand_in_table_file_and_figure(tmp_path):
    theirs = mean_points([with_intervals(curve((0.93, 0.0), (0.88, 0.40), (0.80, 0.50)), 0.04)])
    found = compare(theirs, [with_intervals(OURS[0])])
    gap = found["conditional"]["gaps"][1]
    assert gap["ra_gap_ci"] == pytest.approx([0.02 - 0.05, 0.02 + 0.05]), "3 and 4 points, independent, make 5"
    text = io.StringIO()
    print_comparison(found, ABOUT, Console(file=text, width=160))
    for expected in ("88.0 [84.0, 92.0]", "87.0 [84.0, 90.0]", "2.0 [-3.0, 7.0]"):
        assert expected in text.getvalue()
    rows = list(csv.DictReader(write_comparison(found, ABOUT, tmp_path / "test")[1].open()))
    assert pytest.approx(0.84) in [float(r["sa_low"]) for r in rows if r["lambda"] == "0.2" and r["sa_low"]]
    plain = compare(mean_points([curve((0.93, 0.0), (0.88, 0.40), (0.80, 0.50))]), [OURS[0]])
    write_comparison(plain, ABOUT, tmp_path / "plain")
    bars = [(tmp_path / f"{name}.svg").read_text().count("LineCollection") for name in ("test", "plain")]
    assert bars[0] > bars[1], "bars are drawn where there are intervals"


def test_a_search_is_drawn_with_and_without_a_best_trial(tmp_path):
    comparison = compare(DEDICATED)
    for best in (1, None):
        path = tmp_path / f"{best}.svg"
        plots.draw_search(OURS, best, comparison, ABOUT, path)
        assert ("best trial" in path.read_text()) == (best is not None)
