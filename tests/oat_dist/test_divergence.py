"""A loss or a weight that is not finite: found without waiting, named, stopped on all ranks, never written."""

import dataclasses
import json
import math
import pathlib

import pytest
import torch

from oat_dist import training as loop
from oat_dist.checkpoint import CheckpointStore
from oat_dist.config import AttackConfig, Config, DataConfig, OptimConfig
from oat_dist.data import TrainLoader, open_prepared
from oat_dist.distributed import World
from oat_dist.divergence import LossWatch, require_finite
from oat_dist.errors import NonFiniteError
from oat_dist.metrics import keep_metrics_until
from tests.ranks import run_ranks

STEPS_PER_EPOCH = 2  # 1437 digits, batch 700


def no_checkpoint():
    return None


def message(act) -> str:
    with pytest.raises(NonFiniteError) as error:
        act()
    return str(error.value)


def test_the_message_names_the_first_step_and_counts_its_images_by_lambda():
    watch = LossWatch(World())
    lam = torch.tensor([0, 0, 0.1, 0.3, 0.7, 1.0, 1.0], dtype=torch.float64)
    good = torch.ones(7)
    watch.add(1, good, lam)
    watch.check(no_checkpoint)
    watch.add(2, good, lam)  # first micro-batch of step 2
    bad = good.clone()
    bad[3], bad[5] = math.nan, math.inf
    watch.add(2, bad, lam)
    watch.add(2, good, lam)
    watch.add(3, torch.full((7,), math.nan), lam)
    expected = (
        "at step 2 for 2 of 21 images; by lambda 0: 0/6, (0,0.1]: 0/3, (0.2,0.3]: 1/3, (0.6,0.7]: 0/3, (0.9,1]: 1/6"
    )
    said = message(lambda: watch.check(no_checkpoint))
    assert expected in said and "last good checkpoint: none yet" in said and "\n" not in said


def test_every_tenth_belongs_to_the_bin_that_ends_with_it():
    watch = LossWatch(World())
    watch.add(1, torch.full((11,), math.nan), torch.tensor([tenth / 10 for tenth in range(11)], dtype=torch.float64))
    said = message(lambda: watch.check(no_checkpoint))
    assert said.count(": 1/1") == 11 and "(0,0.1]: 1/1" in said and "(0.9,1]: 1/1" in said


def test_watching_does_not_wait_for_the_device():
    from tests.oat_dist.test_step import _NoWaiting

    watch, lam = LossWatch(World()), torch.tensor([0.0, 0.5], dtype=torch.float64)
    with _NoWaiting():
        watch.add(1, torch.tensor([1.0, math.nan]), lam)
        watch.add(2, torch.ones(2), lam)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_named_and_a_finite_one_passes(value):
    parts = {"network": {"a": torch.ones(3), "n": torch.tensor(2**60)}, "optimizer": {"a": torch.ones(2)}}
    require_finite(parts, 4, world=World(), last_good=no_checkpoint)
    parts["optimizer"]["a"][1] = value
    said = message(lambda: require_finite(parts, 4, world=World(), last_good=no_checkpoint))
    assert said.startswith("not finite after step 4: optimizer a; last good checkpoint: none yet")


def make_config(root, **optim) -> Config:
    optim = {"batch_size": 700, "lr": 0.05, "epochs": 3, "ema_decay": 0.5} | optim
    return Config(
        data=DataConfig(root=root, loader="memory", shift_pixels=1),
        attack=AttackConfig(eps_255=76.5, steps=1),
        optim=OptimConfig(**optim),
        logging=dataclasses.replace(Config().logging, interval_steps=3, tensorboard=False),
    )


def train(config, world, folder, *, poisoned_at=None, poisoned_rank=0, checkpoint=None):
    """Train in a folder; losses of the images with lambda = 1 are not a number at one step, on one rank."""
    folder.mkdir(exist_ok=True)
    data = open_prepared(config.data.root, "digits")
    loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
    training = loop.Training(config, data, loader, world=world, run=folder, checkpoint=checkpoint)
    honest = loop.training_losses

    def losses(network, batch, lam_N, **settings):
        result = honest(network, batch, lam_N, **settings)
        if training.step + 1 != poisoned_at or world.rank != poisoned_rank:
            return result
        poison_N = torch.where(lam_N == 1, math.nan, 1.0).float()
        return dataclasses.replace(result, loss_N=result.loss_N * poison_N)

    loop.training_losses = losses
    try:
        training.fit()
        return {name: value.clone() for name, value in training.finish().state_dict().items()}
    finally:
        loop.training_losses = honest


def poisoned_and_resumed(world, root, folder):
    """The error of a poisoned run, what it left, and whether going on ends as an undisturbed run does."""
    from oat_dist.engine import init_world

    world = dataclasses.replace(init_world(threads=1), device=world.device)
    config, left = make_config(root), pathlib.Path(folder, "left")
    expected = train(config, world, pathlib.Path(folder, "undisturbed"))
    try:
        train(config, world, left, poisoned_at=2 * STEPS_PER_EPOCH, poisoned_rank=world.ranks - 1)
        said = None
    except NonFiniteError as error:
        said = str(error)
    store = CheckpointStore(left / "checkpoints", keep=2)
    checkpoint = world.on_main(store.newest)
    metrics = world.on_main(lambda: (left / "metrics.jsonl").read_text())
    finite = all(t.isfinite().all() for part in ("network", "averaged") for t in checkpoint.tensors(part).values())
    world.on_main(lambda: keep_metrics_until(left, checkpoint.step))
    got = train(config, world, left, checkpoint=checkpoint)
    same = all(torch.equal(got[name], expected[name]) for name in expected)
    return said, checkpoint.step, metrics, bool(finite), same


@pytest.mark.dist
@pytest.mark.slow
def test_a_poisoned_run_stops_on_all_ranks_and_goes_on_from_its_last_good_checkpoint(digits, tmp_path):
    results = run_ranks(poisoned_and_resumed, 2, str(digits.folder.parent), str(tmp_path))
    for said, step, metrics, finite, same in results:
        assert said is not None and said == results[0][0]
        assert said.startswith(f"loss is not finite at step {2 * STEPS_PER_EPOCH} for ")
        assert f"last good checkpoint: {tmp_path}/left/checkpoints/step_00000002 (step 2)" in said
        assert step == STEPS_PER_EPOCH and finite and same
        assert [json.loads(line)["step"] for line in metrics.splitlines()] == [3] and "NaN" not in metrics


def too_fast(world, root, folder):
    """A learning rate that breaks the weights in the last step before a checkpoint, after finite losses."""
    from oat_dist.engine import init_world

    init_world(threads=1)
    config = make_config(root, lr=1e38, weight_decay=1e3, epochs=1, batch_size=1400)
    with pytest.raises(NonFiniteError) as error:
        train(config, world, pathlib.Path(folder))
    return str(error.value)


@pytest.mark.dist
def test_weights_that_are_not_finite_are_not_written_though_every_loss_was_finite(digits, tmp_path):
    (said,) = run_ranks(too_fast, 1, str(digits.folder.parent), str(tmp_path))
    assert said.startswith("not finite after step 1: network ")
    assert "last good checkpoint: none yet" in said
    assert not list(tmp_path.rglob("*.safetensors"))
