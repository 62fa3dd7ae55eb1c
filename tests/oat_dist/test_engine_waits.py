"""DeepSpeed around a step does not make the host wait for the device."""

import pytest
import torch

from oat_dist.config import AttackConfig, Config, EngineConfig, OptimConfig
from oat_dist.distributed import World
from oat_dist.models import build_model
from oat_dist.step import training_losses
from tests.oat_dist.test_step import make_batch
from tests.ranks import run_ranks

STEPS = 4
"""DeepSpeed's stopwatch begins with the third."""


@pytest.mark.dist
def test_no_step_without_zero_waits_for_the_device():
    assert run_ranks(waits, 1) == [[0] * STEPS]


def waits(world: World) -> list[int]:
    """How often DeepSpeed waited in each step; its hooks run in the attack too, where a recording forbids it."""
    from deepspeed.accelerator import get_accelerator

    from oat_dist.engine import Engine, init_world

    init_world(threads=1)
    config = Config(
        attack=AttackConfig(eps_255=76.5, steps=1), optim=OptimConfig(batch_size=4), engine=EngineConfig(zero_stage=0)
    )
    network = build_model(config, in_channels=1, num_classes=10)
    engine, called, counts = Engine(network, config, world), [], []
    get_accelerator().synchronize = lambda *_: called.append(1)
    lam, batch = torch.tensor([0, 0.1, 0.4, 1], dtype=torch.float64), make_batch(4, dtype=torch.float32)
    for epoch in range(STEPS):
        called.clear()
        losses = training_losses(network, batch, lam, config=config, epoch=epoch, forward=engine.forward)
        engine.backward_and_step(losses.loss_N, config.optim.lr)
        counts.append(len(called))
    return counts
