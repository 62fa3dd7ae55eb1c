"""A run that was killed and goes on ends exactly where an undisturbed one ends."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from oat_dist.checkpoint import CheckpointStore
from oat_dist.config import (
    AttackConfig,
    ConditioningConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
)
from oat_dist.data import TrainLoader, open_prepared, prepare
from oat_dist.data.ffcv_io import is_installed
from oat_dist.training import Training
from tests.ranks import run_ranks

EPOCHS, BATCH = 3, 32  # three steps per epoch of the small set
KILLED_AT = 7  # in the third epoch, one step after a checkpoint


def make_config(
    root, *, loader="memory", norm="linf", sync=False, optim=None, validate=0, extra=None, robust="pgd_at", model=None,
    attack=None, distill=False, conditioning=None, **engine,
) -> Config:  # fmt: skip
    return Config(
        data=DataConfig(root=root, dataset="small", loader=loader, shift_pixels=1, extra=extra, extra_share=0.1),
        model=ModelConfig(**model or {}),
        conditioning=ConditioningConfig(**conditioning or {}),
        loss=LossConfig(robust=robust, distill_widths=distill),
        attack=AttackConfig(norm=norm, eps_255=76.5 if norm == "linf" else 300.0, **attack or {"steps": 1}),
        optim=OptimConfig(**{"batch_size": BATCH, "lr": 0.05, "epochs": EPOCHS, "ema_decay": 0.5} | (optim or {})),
        engine=EngineConfig(sync_statistics=sync, **engine),
        evaluation=EvaluationConfig(interval_epochs=validate, steps=1, lambdas=(0.0, 1.0)),
        logging=dataclasses.replace(Config().logging, interval_steps=2, tensorboard=False),
    )


SETTINGS = {
    "zero 0": {},
    "zero 1": {"zero_stage": 1},
    "zero 2, accumulating": {"zero_stage": 2, "accumulation": 2, "optim": {"decay": "weights", "film_lr": 3.0}},
    "bf16": {"precision": "bf16"},
    "adamw, extra images": {"optim": {"optimizer": "adamw", "nesterov": False}, "extra": "small", "robust": "rst_adv"},
    "adamw, zero 1": {"optim": {"optimizer": "adamw", "nesterov": False, "decay": "weights"}, "zero_stage": 1},
    "muon, accumulating": {"optim": {"optimizer": "muon"}, "accumulation": 2},
    "no momentum, zero 2": {"optim": {"momentum": 0.0, "nesterov": False}, "zero_stage": 2},
    "choosing by validation": {"validate": 1},
    "fewer attack steps in two epochs": {"attack": {"steps": 2, "early_steps": 1, "early_share": 0.7}},
    "sandwich of widths, distilled, zero 1": {
        "model": {"widths": (0.25, 0.5, 0.75, 1.0), "width_rule": "sandwich", "width_samples": 1, "width_heads": True},
        "distill": True, "zero_stage": 1,
    },
    "perturbed weights, zero 1": {"optim": {"awp_gamma": 0.01, "awp_warmup_share": 0.3}, "zero_stage": 1},
    "weight noise": {"conditioning": {"kind": "float", "film": "none", "lambdas": (0.0, 1.0)}},
}  # fmt: skip
if is_installed():
    SETTINGS["ffcv"] = {"loader": "ffcv"}


class KilledError(Exception):
    """Stands for the signal."""


def run(config, world, folder, *, killed_at=None, checkpoint=None):
    """Train in a folder, up to `killed_at` steps if given. Everything a run ends with, or None if it was killed."""
    folder.mkdir(exist_ok=True)
    data = open_prepared(config.data.root, "small")
    loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
    training = Training(config, data, loader, world=world, run=folder, checkpoint=checkpoint)
    if killed_at is not None:
        take_step = training._take_step

        def step(*args):
            if training.step == killed_at:
                raise KilledError
            take_step(*args)

        training._take_step = step
    try:
        training.fit()
    except KilledError:
        training.store.wait()
        return None
    state = {f"optimizer {k}": v.clone() for k, v in training.engine.optimizer_state().items()}
    state |= {f"final {k}": v.clone() for k, v in training.finish().state_dict().items()}
    return state | {f"network {k}": v.clone() for k, v in training.network.state_dict().items()}


def newest(folder):
    return CheckpointStore(folder / "checkpoints", keep=2).newest()


def undisturbed_and_killed(world, root, folder):
    """For all settings: what differs between an undisturbed run and one that was killed and went on."""
    from oat_dist.engine import init_world
    from oat_dist.metrics import keep_metrics_until

    world = dataclasses.replace(init_world(threads=1), device=world.device)
    differing = {}
    for name, settings in SETTINGS.items():
        config = make_config(root, **settings)
        one, two = (pathlib.Path(folder, f"{name} {kind}") for kind in ("undisturbed", "killed"))
        expected = run(config, world, one)
        assert run(config, world, two, killed_at=KILLED_AT) is None
        checkpoint = world.on_main(lambda two=two: newest(two))
        world.on_main(lambda two=two, at=checkpoint.step: keep_metrics_until(two, at))
        got = run(config, world, two, checkpoint=checkpoint)
        different = [key for key in expected if not torch.equal(expected[key], got[key])]
        if (one / "metrics.jsonl").read_bytes() != (two / "metrics.jsonl").read_bytes():
            different.append("metrics.jsonl")
        steps = [json.loads(line)["step"] for line in (one / "metrics.jsonl").read_text().splitlines()]
        differing[name] = (checkpoint.step, different, len(expected), steps)
    return differing


@pytest.fixture(scope="module")
def small_root(digits, tmp_path_factory):
    """A folder with the first 100 training and 40 other digits, prepared as the data set `small`."""
    root = tmp_path_factory.mktemp("small")
    tensors = {split: load_file(digits.file(split, "memory")) for split in ("train", "val", "test")}
    arrays = {}
    for split, count in (("train", 100), ("val", 20), ("test", 20)):
        arrays |= {f"x_{split}": tensors[split]["image"][:count], f"y_{split}": tensors[split]["label"][:count]}
    np.savez(root / "small.npz", **arrays)
    prepare(str(root), f"npz:{root / 'small.npz'}")
    return str(root)


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def differences(request, small_root, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    return run_ranks(undisturbed_and_killed, request.param, small_root, folder)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_run_ends_bit_identical_to_an_undisturbed_one(differences, name):
    for rank in differences:
        step, different, compared, steps = rank[name]
        assert step == 6, "the checkpoint before the kill"
        assert not different
        assert compared > 150
        assert sorted(set(steps)) == ([2, 3, 4, 6, 8, 9] if "validation" in name else [2, 4, 6, 8, 9])


def part(world, root, folder, killed):
    """Train in a folder until killed, or go on there with whatever ranks there are now; rank 0's result."""
    from oat_dist.engine import init_world

    world = dataclasses.replace(init_world(threads=1), device=world.device)
    # A low learning rate: float32 rounding turns a ReLU now and then, and the gradient with it.
    config = make_config(root, norm="l2", sync=True, zero_stage=1, optim={"lr": 0.005})
    folder = pathlib.Path(folder)
    if killed:
        return run(config, world, folder, killed_at=KILLED_AT)
    checkpoint = newest(folder)
    data = open_prepared(root, "small")
    loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
    training = Training(config, data, loader, world=world, run=folder, checkpoint=checkpoint)
    restored = {"network": training.network.state_dict(), "averaged": training.averaged.network.state_dict()}
    restored["optimizer"] = training.engine.optimizer_state()
    for name, tensors in restored.items():
        saved = checkpoint.tensors(name)
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[key], saved[key]) for key in saved), f"{name} is not what was saved"
    return run(config, world, folder, checkpoint=checkpoint)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(small_root, tmp_path, before, after):
    root, stays, moves = small_root, tmp_path / "stays", tmp_path / "moves"
    run_ranks(part, before, root, str(stays), True)
    shutil.copytree(stays, moves)
    (expected, *_) = run_ranks(part, before, root, str(stays), False)
    (got, *_) = run_ranks(part, after, root, str(moves), False)
    assert len(got) == len(expected) > 150
    for key, value in expected.items():
        # Momentum and statistics are sums over the batch, so a turned ReLU shows in them undamped by the learning rate.
        tolerance = 1e-2 if key.startswith("optimizer") else 1e-3 if "running_" in key else 1e-5
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=tolerance, msg=key)
