"""Schedules, optimisers, averaged weights."""

import pytest
import torch
from torch import nn

from oat_dist.config import ConditioningConfig, Config, EngineConfig, ModelConfig, OptimConfig
from oat_dist.models import build_model
from oat_dist.optim import AveragedNetwork, build_optimizer, learning_rate
from tests.ranks import run_ranks


def test_cosine_falls_from_the_peak_to_zero_and_is_half_way_at_half_the_peak():
    cfg = OptimConfig(lr=0.4)
    rates = [learning_rate(cfg, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.4) and rates[50] == pytest.approx(0.2) and rates[100] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_onecycle_rises_then_falls_linearly():
    cfg = OptimConfig(lr=1.0, schedule="onecycle", warmup_share=0.2)
    rates = [learning_rate(cfg, step, 100) for step in range(100)]
    assert rates.index(max(rates)) == 20 and max(rates) == pytest.approx(1.0)
    assert 0 < rates[0] < rates[10] < rates[19] < 1
    assert rates[60] == pytest.approx(0.5)


def test_warm_up_works_with_every_schedule_and_constant_stays():
    assert learning_rate(OptimConfig(lr=1.0, warmup_share=0.1), 4, 100) == pytest.approx(5 / 11)
    assert learning_rate(OptimConfig(lr=0.3, schedule="constant"), 77, 100) == 0.3


def test_the_rate_is_scaled_with_the_batch_for_which_it_is_not_meant():
    cfg = OptimConfig(lr=0.1, lr_batch_size=256, batch_size=8192, warmup_share=0.1, schedule="constant")
    assert cfg.peak_lr == pytest.approx(3.2)
    rates = [learning_rate(cfg, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(3.2 / 11) and rates[50] == pytest.approx(3.2)
    assert build_optimizer(nn.Linear(2, 2), cfg).param_groups[0]["lr"] == cfg.peak_lr
    assert OptimConfig(lr=0.1, batch_size=129).peak_lr == 0.1


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimisers_are_built_as_configured(name, kind):
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer=name, lr=0.01, weight_decay=0.2))
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.01 and optimizer.param_groups[0]["weight_decay"] == 0.2
    assert name != "sgd" or (optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[0]["nesterov"])


@pytest.mark.parametrize("name", ["wrn10_2", "resnet8"])
def test_decay_of_weights_spares_norms_biases_and_film(name):
    network = build_model(Config(model=ModelConfig(name=name)), num_classes=3, in_channels=1)
    optimizer = build_optimizer(network, OptimConfig(decay="weights", weight_decay=0.2))
    names = {parameter: name for name, parameter in network.named_parameters()}
    decayed = {names[p] for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0.2}
    spared = {names[p] for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0}
    assert decayed | spared == set(names.values()) and not decayed & spared
    plain = build_model(
        Config(model=ModelConfig(name=name), conditioning=ConditioningConfig(film="none", norm="single")),
        num_classes=3,
        in_channels=1,
    )
    kernels = {name for name, parameter in plain.named_parameters() if parameter.dim() == 4}
    classifier = {name for name, p in plain.named_parameters() if p.dim() == 2 and len(p) == 3}
    assert kernels and classifier and decayed == kernels | classifier


def moves(world, film_lr):
    """By how much each parameter moves in a step of the engine; every one has the gradient 1."""
    from oat_dist.engine import Engine

    optim = OptimConfig(film_lr=film_lr, momentum=0.0, nesterov=False, weight_decay=0.0, batch_size=1)
    config = Config(optim=optim, engine=EngineConfig(threads=1))
    network = build_model(config, num_classes=3, in_channels=1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    loss = sum(p.sum() for p in network.parameters())
    Engine(network, config, world).backward_and_step(loss[None], 0.5)
    return {name: before[name] - p.detach() for name, p in network.named_parameters()}


def moves_at(world):
    from oat_dist.engine import init_world

    return [moves(init_world(threads=1), film_lr) for film_lr in (1.0, 3.0)]


@pytest.mark.dist
def test_film_may_learn_faster_than_all_else():
    ((plain, faster),) = run_ranks(moves_at, 1)
    for name, moved in plain.items():
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5))
        is_film = ".film." in name
        torch.testing.assert_close(faster[name], (3 if is_film else 1) * moved, msg=name)
    assert any(".film." in name for name in plain)


def test_the_average_follows_its_definition_for_parameters_and_running_statistics():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    averaged = AveragedNetwork(network, 0.9)
    expected = {k: v.clone().double() for k, v in network.state_dict().items()}
    gen = torch.Generator().manual_seed(0)
    for step in range(200):
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn(tensor.shape, generator=gen))
        decay = min(0.9, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value.double()
        averaged.update(step)
    for key, value in averaged.network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-4, atol=1e-4, msg=key)
    assert not any(p.requires_grad for p in averaged.network.parameters())
