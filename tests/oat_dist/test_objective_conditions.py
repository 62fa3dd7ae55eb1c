"""A step of every objective at a width, with weight noise and with shared statistics, against networks without them."""

import dataclasses

import pytest
import torch

from oat_dist.config import ConditioningConfig, Config, ModelConfig
from oat_dist.export import cut_config, cut_out
from oat_dist.losses import ROBUST
from oat_dist.step import training_losses
from tests.oat_dist.test_objective_steps import make_config
from tests.oat_dist.test_step import disturbed, make_batch

LAM = torch.tensor([0, 0, 0.1, 0.4, 1, 1], dtype=torch.float64)
ENDS = (LAM > 0.2).double().sort().values
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def told(name: str, *, widths=(1.0,), **conditioning) -> Config:
    return dataclasses.replace(
        make_config(name), model=ModelConfig(widths=widths), conditioning=ConditioningConfig(**conditioning)
    )


def losses_and_gradient(config: Config, network, lam, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-image losses of a step, and what they do to the weights of the first block."""
    batch = make_batch(len(lam))
    loss_N = training_losses(network, batch, lam, config=config, epoch=0, forward=network, **options).loss_N
    return loss_N, torch.autograd.grad(loss_N.sum(), network.blocks[0].conv1.weight)[0]


@pytest.mark.parametrize("name", ROBUST)
def test_a_step_of_an_objective_at_a_width_is_that_of_the_narrow_network(name):
    config = told(name, widths=(0.5, 1.0))
    network = disturbed(config)
    narrow, narrow_config = cut_out(network, 0.5), cut_config(config, 0.5)
    loss_N, gradient = losses_and_gradient(config, network, LAM, width=0.5)
    expected_N, expected = losses_and_gradient(narrow_config, narrow, LAM)
    torch.testing.assert_close(loss_N, expected_N, **EXACT)
    torch.testing.assert_close(gradient[:8, :8], expected, **EXACT)
    assert gradient.any() and not gradient[8:].any() and not gradient[:, 8:].any()


@pytest.mark.parametrize("name", ROBUST)
def test_a_step_of_an_objective_with_weight_noise_of_strength_zero_is_that_without(name):
    ends = {"film": "none", "lambdas": (0.0, 1.0)}
    plain = disturbed(told(name, **ends))
    configs = [told(name, kind="float", noise_start=start, **ends) for start in (0.0, 0.25)]
    results = [losses_and_gradient(told(name, **ends), plain, ENDS)]
    for config in configs:
        network = disturbed(config)
        network.load_state_dict({**network.state_dict(), **disturbed(told(name, **ends)).state_dict()})
        results.append(losses_and_gradient(config, network, ENDS))
    (expected_N, expected), (loss_N, gradient), (noisy_N, noisy) = results
    torch.testing.assert_close(loss_N, expected_N, **EXACT)
    torch.testing.assert_close(gradient, expected, **EXACT)
    torch.testing.assert_close(noisy_N[:2], expected_N[:2], **EXACT)
    assert not torch.allclose(noisy_N[2:], expected_N[2:]) and noisy.isfinite().all()


@pytest.mark.parametrize("name", ROBUST)
def test_shared_statistics_of_a_step_are_of_all_its_images_whatever_the_objective(name):
    config = told(name, norm="shared_statistics")
    network, seen = disturbed(config), []
    before = network.stem_norm.running_mean.clone()
    network.stem.register_forward_hook(
        lambda module, args, output: seen.append(output.detach()) if module.training else None
    )  # fmt: skip
    losses_and_gradient(config, network, LAM)
    views = ROBUST[name].views
    assert [len(x) for x in seen] == [6 + 4 * views]
    expected = 0.9 * before[0] + 0.1 * seen[0].mean((0, 2, 3))
    torch.testing.assert_close(network.stem_norm.running_mean[0], expected, **EXACT)
