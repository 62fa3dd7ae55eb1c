"""Points, intervals and matrices from what happened to every image; the choice of a lambda."""

import io
import math

import pytest
import torch
from rich.console import Console

from oat_dist.errors import UserError
from oat_dist.evaluation import Outcome, Plan, parse_attacks
from oat_dist.evaluation.choice import choose
from oat_dist.evaluation.intervals import intervals
from oat_dist.evaluation.summary import summary, write_images
from oat_dist.report import print_report, write_report
from oat_dist.weights import read_tensors

TWO = parse_attacks(["pgd-5", "cw-5"], eps=0.1, norm="linf")


def outcome(rows, **settings):
    plan = Plan(attack=TWO, **settings)
    assert len(rows) == len(plan.cells)
    code = torch.tensor(rows, dtype=torch.int8)
    return Outcome(plan=plan, index_M=torch.arange(code.shape[1]), code_CM=code, outside=0)


def test_points_count_images_and_attacks():
    points = summary(outcome([[-1, 0, 1, 2, -1], [-1, -1, -1, -1, 1]], lambdas=(0.0, 1.0)))["points"]
    assert [(p["lam"], p["sa"], p["ra"]) for p in points] == [(0.0, 0.8, 0.4), (1.0, 1.0, 0.8)]
    assert points[0]["ra_after"] == {"pgd-5": 0.6, "cw-5": 0.4}
    assert points[0]["ra_after_ci"]["cw-5"] == points[0]["ra_ci"] and points[0]["ra_after_ci"]["pgd-5"][1] > 0.6
    for point in points:
        assert point["sa_ci"][0] <= point["sa"] <= point["sa_ci"][1]
    assert points[1]["sa_ci"] == [1.0, 1.0], "where all images agree the interval is a point"


def test_the_worst_lambda_is_chosen_image_by_image_and_the_matrix_has_all_pairs():
    rows = [[-1, -1, -1, 0], [-1, -1, 1, -1],      # each by itself
            [-1, 1, -1, 0], [1, -1, -1, -1]]  # lambda 0 through 1, lambda 1 through 0  # fmt: skip
    found = summary(outcome(rows, lambdas=(0.0, 1.0), attack_lambdas=(0.0, 1.0)))
    assert [(p["ra"], p["ra_worst"]) for p in found["points"]] == [(0.75, 0.5), (0.75, 0.5)]
    matrix = found["matrix"]
    bounds = matrix.pop("ra_ci")
    assert matrix == {"attack_lambdas": [0.0, 1.0], "lambdas": [0.0, 1.0], "ra": [[0.75, 0.75], [0.5, 0.75]]}
    assert bounds[0][0] == found["points"][0]["ra_ci"] and bounds[1][1] == found["points"][1]["ra_ci"]
    assert bounds[1][0][0] < bounds[0][1][0] <= 0.75 <= bounds[0][1][1]
    assert found["points"][0]["ra_worst_ci"][0] <= 0.5 <= found["points"][0]["ra_worst_ci"][1]


def test_the_matrix_is_printed_and_drawn_with_its_intervals(tmp_path):
    rows = [[-1, -1, -1, 0], [-1, -1, 1, -1], [-1, 1, -1, 0], [1, -1, -1, -1]]
    found = summary(outcome(rows, lambdas=(0.0, 1.0), attack_lambdas=(0.0, 1.0)))
    about = {"model": "resnet8", "dataset": "digits", "split": "test", "num_examples": 4, "attack": TWO.to_dict()}
    text = io.StringIO()
    print_report(about | found, write_report(about | found, tmp_path / "x"), Console(file=text, width=160))
    assert "lambda that is attacked through" in text.getvalue() and "50.0 [0.0, 100.0]" in text.getvalue()
    low, high = found["matrix"]["ra_ci"][0][0]
    drawn = (tmp_path / "x.svg").read_text()
    assert "lambda attacked through" in drawn and "75.0" in drawn and f"{50 * (high - low):.1f}" in drawn


def test_lambda_at_random_is_reported_beside_the_curve():
    found = summary(outcome([[-1, 0], [1, -1]], lambdas=(0.5,), random_draws=4))
    assert len(found["points"]) == 1
    drawn = found["random_lambda"]
    assert (drawn["lambdas"], drawn["draws"], drawn["sa"], drawn["ra"]) == ([0.5], 4, 1.0, 0.5)


def test_what_became_of_every_image_reads_back(tmp_path):
    done = outcome([[-1, 0, 2]], lambdas=(0.5,))
    write_images(done, tmp_path / "x.images.safetensors")
    tensors, about = read_tensors(tmp_path / "x.images.safetensors")
    assert torch.equal(tensors["code"], done.code_CM) and tensors["index"].tolist() == [0, 1, 2]
    assert about["cells"] == [{"lam": 0.5, "via": None}]
    assert about["codes"] == {"robust": -1, "clean": 0, "pgd-5": 1, "cw-5": 2}


def test_intervals_are_as_wide_as_the_binomial_says_and_repeat():
    right = torch.zeros(400, 2, dtype=torch.bool)
    right[:120, 0] = right[:360, 1] = True
    found = intervals(right, seed=3)
    for (low, high), share in zip(found, (0.3, 0.9), strict=True):
        half = 1.96 * math.sqrt(share * (1 - share) / 400)
        assert low == pytest.approx(share - half, abs=0.008) and high == pytest.approx(share + half, abs=0.008)
    assert intervals(right, seed=3) == found and intervals(right, seed=4) != found


def test_ninety_five_of_a_hundred_intervals_cover_the_truth():
    gen = torch.Generator().manual_seed(0)
    right = torch.rand(150, 300, generator=gen) < 0.7
    covered = sum(low <= 0.7 <= high for low, high in intervals(right, seed=0))
    assert 0.90 <= covered / 300 <= 0.98


POINTS = [{"lam": 0.0, "sa": 0.95, "ra": 0.1}, {"lam": 0.2, "sa": 0.91, "ra": 0.4}, {"lam": 0.3, "sa": 0.90, "ra": 0.4},
          {"lam": 1.0, "sa": 0.8, "ra": 0.5}]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "target", "lam"), [("sa", 0.9, 0.2), ("sa", 0.5, 1.0), ("ra", 0.3, 0.2), ("ra", 0.45, 1.0), ("ra", 0, 0.0)]
)
def test_the_chosen_lambda_reaches_the_target_and_is_best_otherwise(key, target, lam):
    assert choose(POINTS, key, target)["lam"] == lam


def test_a_target_out_of_reach_is_named_with_what_is_in_reach():
    with pytest.raises(UserError, match=r"--target-sa=0.99: not reached .* highest SA is 0.950, at lambda 0"):
        choose(POINTS, "sa", 0.99)
