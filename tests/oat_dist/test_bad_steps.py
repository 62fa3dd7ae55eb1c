"""A step that is not finite is left out, up to a number, and its evidence kept; or the run stops with it."""

import dataclasses
import json
import math
import pathlib

import pytest
import torch

from oat_dist import training as loop
from oat_dist.bad_steps import RecentSteps, StepHealth, gradient_norm
from oat_dist.data import TrainLoader, open_prepared
from oat_dist.distributed import World
from oat_dist.divergence import LossWatch
from oat_dist.errors import NonFiniteError
from tests.oat_dist.test_divergence import make_config
from tests.ranks import run_ranks


def poisoned(config, world, folder, *, bad_steps):
    """Train one epoch; on the last rank, losses with lambda = 1 are not a number in some steps. State after each."""
    folder.mkdir(exist_ok=True)
    data = open_prepared(config.data.root, "digits")
    loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
    training = loop.Training(config, data, loader, world=world, run=folder, checkpoint=None)
    honest, take_step, states = loop.training_losses, training._take_step, []

    def losses(network, batch, lam_N, **settings):
        result = honest(network, batch, lam_N, **settings)
        if training.step + 1 not in bad_steps or world.rank != world.ranks - 1:
            return result
        return dataclasses.replace(result, loss_N=result.loss_N * torch.where(lam_N == 1, math.nan, 1.0).float())

    def step(*args):
        take_step(*args)
        network = {k: v.clone() for k, v in training.network.state_dict().items()}
        states.append(network | {f"optimizer {k}": v.clone() for k, v in training.engine.optimizer_state().items()})

    loop.training_losses, training._take_step = losses, step
    try:
        training.fit()
        return states, None, training
    except NonFiniteError as error:
        return states, str(error), training
    finally:
        loop.training_losses = honest


def left_out(world, root, folder):
    """Per ZeRO stage: whether the bad second step moved anything, the good third did, what two bad steps come to."""
    from oat_dist.engine import init_world

    world = dataclasses.replace(init_world(threads=1), device=world.device)
    results = {}
    for stage in (0, 2):
        config = make_config(root, batch_size=470, epochs=1)  # three steps
        config = dataclasses.replace(
            config, engine=dataclasses.replace(config.engine, zero_stage=stage, max_bad_steps=1),
            logging=dataclasses.replace(config.logging, interval_steps=1),
        )  # fmt: skip
        where = pathlib.Path(folder, f"one {stage}")
        (first, second, third), said, training = poisoned(config, world, where, bad_steps={2})
        kept = all(torch.equal(first[k], second[k]) for k in first)
        moved = not torch.equal(second["classifier.weight"], third["classifier.weight"])
        evidence = json.loads((where / f"bad_steps/step_00000002_rank{world.rank}.json").read_text())
        _, too_many, _ = poisoned(config, world, pathlib.Path(folder, f"two {stage}"), bad_steps={2, 3})
        results[stage] = (kept, moved, said, training.health.skipped, evidence, too_many)
    return results


@pytest.mark.dist
@pytest.mark.slow
def test_a_bad_step_on_one_rank_is_left_out_on_all_and_one_too_many_stops(digits, tmp_path):
    for rank, results in enumerate(run_ranks(left_out, 2, str(digits.folder.parent), str(tmp_path))):
        for stage, (kept, moved, said, count, evidence, too_many) in results.items():
            assert kept and moved and said is None and count == 1, stage
            assert (evidence["step"], evidence["epoch"], len(evidence["images"])) == (2, 0, 235)
            bad = {image["lam"] for image in evidence["images"] if image["loss"] == "nan"}
            assert bad == ({1.0} if rank == 1 else set())
            assert too_many.startswith("engine.max_bad_steps=1: the gradient of step 3 is not finite, one too many")
    lines = [json.loads(line) for line in (tmp_path / "one 0/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and "loss" not in lines[1]
    assert sorted(path.name for path in (tmp_path / "two 2/bad_steps").iterdir()) == [
        f"step_0000000{step}_rank{rank}.json" for step in (2, 3) for rank in (0, 1)
    ]


def test_a_gradient_that_is_not_finite_stops_a_run_whose_losses_all_are():
    watch = LossWatch(World())
    watch.add(1, torch.ones(2), torch.tensor([0.0, 1.0], dtype=torch.float64))
    watch.add_gradient(1, torch.tensor(3.0))
    watch.check(lambda: None)
    watch.add_gradient(2, torch.tensor(math.inf))
    watch.add_gradient(3, torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="gradient is not finite at step 2, every loss is; last good") as error:
        watch.check(lambda: None)
    assert error.value.step == 2


def test_evidence_is_of_the_step_that_is_asked_for(tmp_path):
    recent = RecentSteps(tmp_path, 0)
    for step in (1, 2):
        lam = torch.tensor([0.0, 0.5], dtype=torch.float64)
        recent.add(step, 4, torch.tensor([step, 7]), lam, torch.tensor([1.5, -math.inf]))
    recent.write(2)
    assert json.loads((tmp_path / "bad_steps/step_00000002_rank0.json").read_text()) == {
        "step": 2, "epoch": 4,
        "images": [{"index": 2, "lam": 0.0, "loss": 1.5}, {"index": 7, "lam": 0.5, "loss": "-inf"}],
    }  # fmt: skip


def test_without_permission_to_leave_steps_out_nobody_waits_for_the_device(tmp_path):
    from tests.oat_dist.test_step import _NoWaiting

    health = StepHealth(World(), tmp_path, torch.nn.BatchNorm2d(1), max_bad_steps=0)
    with _NoWaiting():
        health.begin()
        health.add(1, 0, torch.tensor([3]), torch.tensor([0.5]), torch.tensor([math.nan]))
        assert health.is_good(1, torch.tensor(math.nan))
    with pytest.raises(NonFiniteError, match="loss is not finite at step 1"):
        health.check(lambda: None)
    assert (tmp_path / "bad_steps/step_00000001_rank0.json").is_file()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_of_the_gradient_is_that_of_all_entries_and_shows_a_bad_one(bad):
    gradients = [torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])]
    assert gradient_norm(gradients).item() == 13.0
    gradients[1][0] = bad
    assert not gradient_norm(gradients).isfinite()
