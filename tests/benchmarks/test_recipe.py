"""The table of recipes: every row is a run of its own, published is as published, differences are paired."""

import csv
import json
import pathlib
import types

import paired
import pytest
import recipe
import recipe_speed
import torch

from oat_dist.config import computed_settings, fingerprint
from oat_dist.config_io import load_config
from oat_dist.errors import UserError
from oat_dist.evaluation import EvaluationAttack
from oat_dist.losses import attack_plan, robust_term
from oat_dist.models import build_model
from oat_dist.weights import write_tensors

BASE = ["--config=launch/configs/cifar10_8k_wrn10_2.yaml"]


def test_every_row_of_the_recipe_is_a_run_of_its_own_that_can_be_built():
    rows = recipe.ROWS | {recipe.LONGER: recipe.longer(load_config(BASE), 1.3)}
    configs = {row: load_config(BASE, settings) for row, settings in rows.items()}
    assert len({fingerprint(config) for config in configs.values()}) == len(rows)
    assert fingerprint(configs["default"]) == fingerprint(load_config(BASE))
    for config in configs.values():
        robust_term(config)
        attack_plan(config)
        build_model(config, in_channels=3, num_classes=10).condition(torch.zeros(1, dtype=torch.float64))
    assert configs["uniform"].conditioning.mass_at_zero == pytest.approx(configs["default"].conditioning.mass_at_zero)


def test_the_published_row_is_the_published_recipe_whatever_the_default_is():
    changed = ["--loss.label_smoothing=0.1", "--optim.decay=weights", "--data.cutout_pixels=4", "--model.init=kaiming",
               "--conditioning.norm=shared_statistics", "--attack.steps=2", "--optim.clip_norm=1"]  # fmt: skip
    ours = load_config([*BASE, *changed], recipe.PUBLISHED)
    theirs = load_config(["--config=launch/configs/cifar10_resnet34_published.yaml"])
    assert attack_plan(ours) == attack_plan(theirs)
    # The first three are what is trained on what for how long; the others say what is otherwise left to the data set
    # and to the objective.
    own = {"data.dataset", "model.name", "optim.epochs"}
    said = {"data.shift_pixels", "data.flip", "attack.steps", "attack.random_start"}
    pairs = computed_settings(ours), computed_settings(theirs)
    assert {key for key in pairs[0] if pairs[0][key] != pairs[1][key]} == own | said


def test_a_longer_run_fits_into_the_wall_time_and_needs_a_ratio():
    base = load_config(BASE)
    assert recipe.longer(base, 1.3) == {"optim.epochs": 9}  # 9.1 epochs
    for ratio in (None, 1.1):
        with pytest.raises(UserError, match=rf"--time-ratio={ratio}: must give default_longer more than optim.epochs"):
            recipe.longer(base, ratio)


def test_the_interval_of_a_paired_difference_knows_which_images_are_the_same():
    key = ("sa", 0.0)
    half = torch.arange(400) % 2 == 0
    better = half | (torch.arange(400) < 40)  # right on 20 images more, wrong on none that the other got right
    more, low, high = paired.difference([{key: better}], [{key: half}], key)
    assert more == pytest.approx(0.05)
    # One in twenty images differs: standard error sqrt(0.05 * 0.95 / 400), a third of that of independent images.
    assert (high - low) / 2 == pytest.approx(1.96 * (0.05 * 0.95 / 400) ** 0.5, rel=0.15)
    assert paired.difference([{key: half}], [{key: half}], key) == (0, 0, 0)
    # Seeds are pooled image by image, however many there are.
    assert paired.difference([{key: half}, {key: ~half}], [{key: half}], key)[0] == pytest.approx(0)
    pooled = paired.difference([{key: half}, {key: ~half}], [{key: torch.ones(400)}], key)
    assert pooled == pytest.approx((-0.5, -0.5, -0.5)), "each image is right with one of two seeds"


def test_images_are_read_in_the_order_of_their_indices_and_a_report_without_them_is_named(tmp_path):
    data = types.SimpleNamespace(name="toy", counts={"val": 3})
    attack = EvaluationAttack(eps=0.3)
    point = {"lam": 0.5, "sa": 2 / 3, "ra": 1 / 3}
    report = {"model": "m", "dataset": "toy", "split": "val", "num_examples": 3, "attack": attack.to_dict()}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/val_eps76.5.json").write_text(json.dumps(report | {"points": [point]}))
    with pytest.raises(UserError, match=r"val_eps76.5.json: lacks val_eps76.5.images.safetensors beside it; remove"):
        paired.right_images(tmp_path, [0.5], attack, data, "val")
    tensors = {"index": torch.tensor([7, 2, 5], dtype=torch.int32)}
    tensors["code"] = torch.tensor([[-1, 1, 0], [0, 0, 0]], dtype=torch.int8)
    cells = [{"lam": 0.5, "via": None}, {"lam": 0.5, "via": 1.0}]
    write_tensors(tensors, tmp_path / "eval/val_eps76.5.images.safetensors", {"cells": cells})
    right = paired.right_images(tmp_path, [0.5], attack, data, "val")
    assert right["sa", 0.5].tolist() == [True, False, True] and right["ra", 0.5].tolist() == [False, False, True]
    assert len(right) == 2, "attacked through another lambda is another quantity"


def test_the_table_shows_differences_with_their_intervals_but_none_of_a_row_to_itself():
    images = torch.arange(100)
    ours, theirs = ([{(k, lam): images < n for k in ("sa", "ra") for lam in (0.0, 1.0)}] for n in (60, 40))
    rows = [recipe.compared({"row": name}, side, theirs) for name, side in (("default", ours), ("published", theirs))]
    assert rows[0]["more_sa_0"] == 20.0 and rows[0]["more_ra_1_low"] < 20 < rows[0]["more_ra_1_high"]
    text = recipe.report(rows, "published", {"seeds": "0"})
    assert "| default | +20.0 [+" in text and "| published |  |  |" in text and text.endswith("seeds 0")


def test_the_documents_have_a_place_for_both_tables():
    text = pathlib.Path("docs/reproduction.md").read_text()
    for name in ("recipe cifar10_8k_wrn10_2", "recipe cifar10_8k_wrn10_2 validation"):
        assert f"<!-- begin {name} -->" in text.partition(f"<!-- end {name} -->")[0]


def test_the_speeds_of_both_recipes_are_measured_in_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe_speed, "RESULTS", tmp_path)
    recipe_speed.main(["--config=launch/configs/digits.yaml", "--data.loader=memory", "--rounds=1", "--batch-size=12"])
    rows = list(csv.DictReader((tmp_path / "recipe_speed_digits.csv").open()))
    assert [row["recipe"] for row in rows] == ["default", "published", "same step"]
    assert [float(rows[0][f"images_{key}"]) for key in ("median", "min", "max")] == [1, 1, 1]
    for row in rows[1:]:
        low, middle, high = (float(row[f"images_{key}"]) for key in ("min", "median", "max"))
        assert 0 < low <= middle <= high and row["rounds"] == "1" and row["clock"] == "processor"
    assert "| published |" in capsys.readouterr().out


def test_going_the_wrong_way_is_told_of_the_mean_over_seeds_between_any_two_lambdas():
    sa, ra = [(0.9, 0.7), (0.8, 0.84), (0.7, 0.81)], [(0.1, 0.3), (0.4, 0.2), (0.2, 0.26)]
    curves = [
        [{"lam": lam, "sa": s[seed], "ra": r[seed]} for lam, s, r in zip((0.0, 0.5, 1.0), sa, ra, strict=True)][::-1]
        for seed in (0, 1)
    ]
    # Means: SA 0.8, 0.82, 0.755; RA 0.2, 0.3, 0.23.
    assert recipe.wrong_way(curves) == (2.0, 7.0)
    assert recipe.wrong_way([[{"lam": 0.0, "sa": 0.9, "ra": 0.1}, {"lam": 1.0, "sa": 0.8, "ra": 0.3}]]) == (0.0, 0.0)
