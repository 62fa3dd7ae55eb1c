"""A small network trains alike on every backend and on the definition."""

import sys

import pytest
import torch

from kernels import film_dual_bn_reference
from oat_dist.config import AttackConfig, Config
from oat_dist.models.resnet import ResNet
from oat_dist.step import training_losses
from tests.oat_dist.test_step import make_batch

NUM_STEPS = {"torch": 30, "triton": 8}
"""The interpreter takes a second for a step."""


def losses(monkeypatch, backend: str, num_steps: int) -> torch.Tensor:
    """Losses of some optimiser steps of a network of three sites."""
    norm = sys.modules["oat_dist.models.norm"]
    kernels = sys.modules["kernels.film_dual_bn"]

    def site(*args, sync, site, **kwargs):
        return film_dual_bn_reference(*args, **kwargs)

    def chosen(*args, **kwargs):
        return kernels.film_dual_bn(*args, **kwargs, backend=backend)

    monkeypatch.setattr(norm, "film_dual_bn", site if backend == "reference" else chosen)
    frozen = "torch" if backend == "reference" else backend
    monkeypatch.setattr(norm, "modulate", lambda *args, **kw: kernels.modulate(*args, **kw, backend=frozen))
    config = Config(attack=AttackConfig(eps_255=76.5, steps=1))
    torch.manual_seed(0)
    network = ResNet(config.conditioning, seed=0, in_channels=1, num_classes=10, blocks=(1,), widths=(4,)).double()
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    lam, batch, found = torch.tensor([0, 0.1, 0.4, 1], dtype=torch.float64), make_batch(4, size=3), []
    for epoch in range(num_steps):
        optimizer.zero_grad()
        loss = training_losses(network, batch, lam, config=config, epoch=epoch, forward=network).loss_N.mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("backend", NUM_STEPS)
def test_a_training_gives_the_losses_of_the_definition(backend, monkeypatch):
    expected = losses(monkeypatch, "reference", NUM_STEPS[backend])
    got = losses(monkeypatch, backend, NUM_STEPS[backend])
    assert expected[-1] < 0.9 * expected[0], "the network learns, so this compares something"
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
