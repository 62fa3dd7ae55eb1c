"""Muon: steps of convolutions are orthogonal, all else is SGD."""

import copy

import pytest
import torch

from oat_dist.config import Config, EngineConfig, ModelConfig, OptimConfig
from oat_dist.errors import UserError
from oat_dist.models import build_model
from oat_dist.muon import Muon, orthogonalized
from oat_dist.optim import build_optimizer, layer_weights


@pytest.mark.parametrize("shape", [(16, 200), (200, 16), (64, 64)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    spread = torch.linspace(0.2, 5, len(vt), dtype=torch.float64)
    found = u.T @ orthogonalized(u * spread @ vt) @ vt.T
    values = found.diagonal()
    assert values.min() > 0.6 and values.max() < 1.25
    assert (found - values.diag()).abs().max() < 1e-12


def test_the_zero_matrix_stays():
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))


def network_and_gradients():
    """A network and a random gradient for every parameter, by name."""
    network = build_model(Config(model=ModelConfig(name="resnet8")), num_classes=3, in_channels=1)
    generator = torch.Generator().manual_seed(1)
    return network, {name: torch.randn(p.shape, generator=generator) for name, p in network.named_parameters()}


def moved(network, gradients, optim, *, factor=1.0, steps=2):
    """By how much every parameter moves in some steps with gradients times a factor, by name."""
    network = copy.deepcopy(network)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = build_optimizer(network, optim)
    for group in optimizer.param_groups:
        group["lr"] = optim.lr * group["lr_factor"]
    for _ in range(steps):
        for name, parameter in network.named_parameters():
            parameter.grad = gradients[name] * factor
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in network.named_parameters()}


def test_convolutions_go_as_far_as_the_rate_says_whatever_the_gradient():
    network, gradients = network_and_gradients()
    optim = OptimConfig(optimizer="muon", lr=0.1, muon_lr=0.03, weight_decay=0.0)
    small, large = moved(network, gradients, optim, steps=1), moved(network, gradients, optim, factor=1000.0, steps=1)
    names = {p: name for name, p in network.named_parameters()}
    convolutions = {names[p] for p in layer_weights(network) if p.dim() == 4}
    assert len(convolutions) > 5
    for name in convolutions:
        torch.testing.assert_close(small[name], large[name], rtol=1e-3, atol=1e-5)
        out, *rest = small[name].shape
        fan_in = torch.Size(rest).numel()
        longest = torch.linalg.matrix_norm(small[name].flatten(1), 2).item()
        assert longest == pytest.approx(0.03 * max(1, out / fan_in) ** 0.5, rel=0.25)


@pytest.mark.parametrize("nesterov", [True, False])
def test_all_but_convolutions_moves_as_in_sgd(nesterov):
    network, gradients = network_and_gradients()
    common = {"lr": 0.1, "weight_decay": 0.01, "nesterov": nesterov}
    ours = moved(network, gradients, OptimConfig(optimizer="muon", **common))
    theirs = moved(network, gradients, OptimConfig(**common))
    equal = {name for name in ours if torch.equal(ours[name], theirs[name])}
    names = {p: name for name, p in network.named_parameters()}
    assert set(ours) - equal == {names[p] for p in layer_weights(network) if p.dim() == 4}


def test_momentum_comes_before_a_step_is_made_orthogonal():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    first, second = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])), torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    optimizer = Muon([{"params": [weight], "orthogonal": True}], lr=1.0, momentum=0.5, nesterov=False)
    weight.grad = first.clone()
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = second.clone()
    optimizer.step()
    expected = before - orthogonalized(0.5 * first + second)
    torch.testing.assert_close(weight.detach(), expected)
    assert (weight.detach() - before).diagonal().abs().min() > 0.5


def test_decay_of_convolutions_is_decoupled():
    network, gradients = network_and_gradients()
    muon = {"optimizer": "muon", "lr": 0.1, "muon_lr": 0.02}
    plain = moved(network, gradients, OptimConfig(weight_decay=0.0, **muon), steps=1)
    decayed = moved(network, gradients, OptimConfig(weight_decay=0.3, **muon), steps=1)
    names = {p: name for name, p in network.named_parameters()}
    for parameter in layer_weights(network):
        if parameter.dim() == 4:
            difference = decayed[names[parameter]] - plain[names[parameter]]
            torch.testing.assert_close(difference, -0.02 * 0.3 * parameter.detach(), rtol=1e-3, atol=1e-6)


def test_slices_of_matrices_and_rates_of_other_optimisers_are_refused():
    with pytest.raises(UserError, match=r"engine\.zero_stage=1: must be 0 with optim\.optimizer=muon"):
        Config(optim=OptimConfig(optimizer="muon"), engine=EngineConfig(zero_stage=1))
    with pytest.raises(UserError, match=r"optim\.muon_lr=0\.1: needs optim\.optimizer=muon"):
        OptimConfig(muon_lr=0.1)
    with pytest.raises(UserError, match=r"optim\.muon_lr=0\.0: must be positive"):
        OptimConfig(optimizer="muon", muon_lr=0.0)
