"""The page as text: what it holds, what cannot get out of it, and what refuses to become one."""

import json
import pathlib
import re
import tomllib

import pytest
import torch

from oat_dist.page import document, write_page
from oat_dist.page.finished import open_finished
from oat_dist.page.summary import page_values
from oat_dist.report import accuracy_text
from tests.shown_runs import HOSTILE

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def values(shown_runs) -> dict:
    return page_values([open_finished(run) for run in shown_runs], device=torch.device("cpu"), num_images=3)


def test_every_number_is_that_of_the_report_and_rounded_as_in_its_table(values, shown_runs):
    for run, shown in zip(shown_runs, values["runs"], strict=True):
        points = {point["lam"]: point for point in json.loads((run / "frontier.json").read_text())["points"]}
        assert points.keys() <= {point["lam"] for point in shown["points"]}
        for point in shown["points"]:
            for key in ("sa", "ra") if point["lam"] in points else ():
                theirs = points[point["lam"]]
                assert point[key] == theirs[key] and point[f"{key}_ci"] == theirs[f"{key}_ci"]
                assert point[f"{key}_text"] == accuracy_text(theirs, key)


def test_runs_have_the_shortest_labels_that_tell_them_apart(shown_runs):
    labels = [page_labels([shown_runs[at] for at in which]) for which in ((0, 1), (0, 2))]
    assert labels[0] == ["first", "second"] and labels[1] == [shown_runs[0].name, shown_runs[2].name]


def page_labels(runs) -> list[str]:
    values = page_values([open_finished(run) for run in runs], device=torch.device("cpu"), num_images=1)
    return [run["label"] for run in values["runs"]]


def test_the_dedicated_networks_beside_a_run_are_shown_with_its_ratio_if_they_are_comparable(values, shown_runs):
    (dedicated,) = values["dedicated"]
    assert [point["lam"] for point in dedicated["points"]] == [0.0, 0.3, 1.0] and len(dedicated["front"]) == 3
    found = json.loads((shown_runs[0].parent / "first_frontier/test.json").read_text())
    assert [run["ratio"] for run in values["runs"]] == [f"{found['conditional']['ratio']:.3f}", None, None]
    path = shown_runs[0].parent / "first_frontier/test.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps(found | {"split": "val"}))
        assert open_finished(shown_runs[0]).frontiers == []
    finally:
        path.write_text(text)


def test_settings_in_which_runs_differ_are_told(values):
    assert {row["key"]: row["values"] for row in values["differences"]} == {
        "name": ["first", "second", "first"], "seed": ["0", "1", "0"]}  # fmt: skip


def test_names_cannot_leave_the_json_or_the_title(values):
    text = document.render(values | {"title": HOSTILE})
    assert HOSTILE not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script") == 2 and text.count("</script") == 2
    inside = re.search(r'<script id="values" type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(inside) == json.loads(json.dumps(values | {"title": HOSTILE}))
    assert values["runs"][2]["folder"].endswith(HOSTILE)


def test_the_page_asks_for_nothing_from_anywhere(values):
    text = document.render(values)
    assert "default-src 'none'" in text and set(re.findall(r"(?:src|href)=(\S*)", text)) == {'"data:,">'}
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\s*\(|@import|url\(", text)
    assert "innerHTML" not in text and "eval(" not in text


def test_the_files_of_the_page_are_installed_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "oat_dist/page"
    installed = {path for pattern in patterns["oat_dist.page"] for path in folder.glob(pattern)}
    assert installed == {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}


def test_a_run_that_is_named_twice_is_shown_once(shown_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(document, "page_values", lambda runs, **_: {"title": str(len(runs))})
    write_page([shown_runs[0], shown_runs[0].parent / "." / shown_runs[0].name], tmp_path / "page.html")
    assert "<h1>1</h1>" in (tmp_path / "page.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
