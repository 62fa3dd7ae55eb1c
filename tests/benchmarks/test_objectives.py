"""The table of all objectives on one recipe."""

import csv
import os
import subprocess
import sys

import numpy as np
import objectives
import pytest
import safetensors.numpy

from oat_dist.config import fingerprint
from oat_dist.config_io import load_config
from oat_dist.data import open_prepared
from oat_dist.errors import UserError
from oat_dist.losses import ROBUST, robust_term


@pytest.mark.parametrize("mode", objectives.MODES)
def test_every_objective_has_a_run_of_its_own_in_either_mode(mode):
    prints = set()
    for name, objective in ROBUST.items():
        extra = {"data.extra": "more"} if "extra_data" in objective.needs else {}
        config = load_config([], objectives.settings_of(name, mode) | extra)
        assert robust_term(config).name == name
        assert (config.conditioning.mass_at_one == 1) == (config.conditioning.film == "none") == (mode == "dedicated")
        # Alone, the method sees clean images exactly where its loss does.
        assert config.loss.clean_at_one == (mode == "once_for_all" or "clean_logits" in objective.needs)
        prints.add(fingerprint(config))
    assert len(prints) == len(ROBUST)


def test_weighted_lambdas_leave_every_row_its_settings():
    argv = ["--config=launch/configs/cifar10_8k_wrn10_2.yaml"]
    assert load_config(argv).conditioning.weights is not None
    alone = [objectives.alone(0.0), objectives.settings_of("trades", "dedicated")]
    assert all(load_config(argv, settings).conditioning.weights is None for settings in alone)
    together = load_config(argv, objectives.settings_of("pgd_at", "once_for_all"))
    assert fingerprint(together) == fingerprint(load_config(argv)), "PGD-AT is the run of launch/train.py"


def test_settings_that_are_not_the_papers_are_named_by_objective():
    own = objectives.own_settings(["llr.weight=0.2", "mart.beta=2", "llr.gradient=0"])
    assert own == {"llr": {"weight": 0.2, "gradient": 0.0}, "mart": {"beta": 2.0}}
    config = load_config([], objectives.settings_of("llr", "dedicated", own["llr"]))
    assert robust_term(config).settings == {"linearity": 4.0, "gradient": 0.0, "weight": 0.2}
    for text, message in {"llr.weight": "expected OBJECTIVE.NAME=VALUE", "nn.weight=1": "no such objective",
                          "llr.wait=1": "no objective has this setting"}.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            objectives.own_settings([text])


def test_half_of_the_training_images_lose_their_labels(digits, tmp_path):
    objectives._write_half(digits, tmp_path, "half")
    half = open_prepared(str(tmp_path), "half")
    whole = safetensors.numpy.load_file(digits.file("train", "memory"))
    kept = safetensors.numpy.load_file(half.file("train", "memory"))["image"]
    with np.load(tmp_path / "half.npz") as archive:
        without = archive["x_unlabeled"]
    assert len(kept) + len(without) == len(whole["image"]) and abs(len(kept) - len(without)) <= 1
    assert np.array_equal(without, whole["image"][1::2])
    # Validation images are drawn anew.
    ours, theirs = (safetensors.numpy.load_file(data.file("val", "memory"))["image"] for data in (half, digits))
    all_ours, all_theirs = [*kept, *ours], [*whole["image"][::2], *theirs]
    assert sorted(image.tobytes() for image in all_ours) == sorted(image.tobytes() for image in all_theirs)
    ours, theirs = (safetensors.numpy.load_file(data.file("test", "memory"))["image"] for data in (half, digits))
    assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_one_command_trains_what_is_missing_and_writes_the_table(digits, tmp_path):
    args = [sys.executable, "benchmarks/objectives.py", "--config=launch/configs/digits.yaml", "--data.loader=memory",
            "--objectives", "min_max", "rst_stab", "--modes", "dedicated", f"--out={tmp_path / 'table.csv'}",
            f"--output_dir={tmp_path / 'runs'}", f"--data.root={digits.folder.parent}", "--optim.epochs=1",
            "--optim.batch_size=240", "--evaluation.steps=1", "--attack.guard=none"]  # fmt: skip

    def rows() -> list[dict]:
        subprocess.run(args, check=True, env={**os.environ, "PYTHONPATH": "."}, capture_output=True)
        return list(csv.DictReader((tmp_path / "table.csv").open()))

    first = rows()
    assert [row["objective"] for row in first] == ["standard", "min_max", "rst_stab"]
    for row, lam in zip(first, (0, 1, 1), strict=True):
        assert 0 <= float(row[f"ra_{lam}"]) <= float(row[f"sa_{lam}"]) <= 100 and float(row["seconds"]) > 0
        assert row[f"sa_{1 - lam}"] == ""
    assert rows() == first, "finished runs are read again, with their times"
