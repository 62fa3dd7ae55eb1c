"""Accuracies per class: from the outcomes that a measurement keeps, or measured again."""

import json

import pytest
import torch

from oat_dist.page import per_class
from oat_dist.page.finished import open_finished, read_images
from tests.shown_runs import NUM_IMAGES

CPU = torch.device("cpu")


def test_classes_weighted_by_their_images_give_the_accuracies_of_the_reports(shown_runs):
    run = open_finished(shown_runs[0])
    assert [point["lam"] for point, _ in run.curve] == [0.0, 0.3, 0.6, 1.0]
    found = per_class.per_class(run, read_images(run), CPU)
    assert found["again"] is False and found["num_examples"] == sum(found["counts"]) == NUM_IMAGES
    for at, (point, _) in enumerate(run.curve):
        for key in ("sa", "ra"):
            right = sum((share or 0) * count for share, count in zip(found[key][at], found["counts"], strict=True))
            assert right / NUM_IMAGES == pytest.approx(point[key], abs=1e-12)
    assert all((share is None) == (count == 0) for share, count in zip(found["sa"][0], found["counts"], strict=True))


def test_without_outcomes_some_images_are_measured_again_and_the_page_says_how_many(shown_runs, monkeypatch):
    monkeypatch.setattr(per_class, "MEASURED_AGAIN", NUM_IMAGES)
    kept, again = (open_finished(shown_runs[at]) for at in (0, 2))
    one = per_class.per_class(kept, read_images(kept), CPU)
    other = per_class.per_class(again, read_images(again), CPU)
    assert other["again"] is True and other["num_examples"] == NUM_IMAGES
    assert other["sa"] == [one["sa"][at] for at in (0, 1, 3)] and other["ra"] == [one["ra"][at] for at in (0, 1, 3)]
    monkeypatch.setattr(per_class, "MEASURED_AGAIN", 30)
    few = per_class.per_class(again, read_images(again), CPU)
    assert few["num_examples"] == sum(few["counts"]) == 30


def test_a_curve_takes_further_lambdas_only_from_the_same_measurement(shown_runs, tmp_path):
    run = open_finished(shown_runs[0])
    path = shown_runs[0] / "eval/other.json"
    assert dict((p["lam"], at.name) for p, at in run.curve)[0.3] == "frontier.json"
    other = json.loads(path.read_text()) | {"num_examples": 90}
    run.reports[path] = other
    assert [point["lam"] for point, _ in run.curve] == [0.0, 0.3, 1.0]
