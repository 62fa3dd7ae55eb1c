"""Cheaper FiLM: its parameters on every network, what a table and a shared trunk compute, between the knots too."""

import pytest
import torch
import torch.nn.functional as F

from oat_dist.config import ConditioningConfig, Config, ModelConfig
from oat_dist.models import MODELS, build_model

LAMBDAS = torch.tensor(Config().conditioning.lambdas, dtype=torch.float64)


def build(film, name="resnet8", **conditioning):
    conditioning = ConditioningConfig(film=film, **conditioning)
    return build_model(Config(model=ModelConfig(name=name), conditioning=conditioning), in_channels=3, num_classes=10)


def disturbed(film, **conditioning):
    network = build(film, **conditioning).double()
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=gen, dtype=torch.float64))
    return network


def num_parameters(network) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_table_and_a_shared_trunk_add_at_most_five_percent_to_every_network_dual_norm_included(name):
    # On shapes alone: the largest networks have tens of millions of weights to draw.
    with torch.device("meta"):
        plain = num_parameters(build("none", name, norm="single"))
        for film in ("table", "shared"):
            assert plain < num_parameters(build(film, name)) <= 1.05 * plain, film


@pytest.mark.parametrize("film", ["table", "shared"])
def test_training_starts_unmodulated(film):
    for site in build(film).condition(LAMBDAS).films:
        if site is not None:
            assert torch.equal(site[0], torch.ones_like(site[0])) and not site[1].any()


def test_a_table_has_a_scale_and_shift_for_every_knot_and_interpolates_between_them():
    network = disturbed("table")
    table = network.blocks[1].norm1.film.table
    index = network.blocks[1].norm1.index
    scale, shift = network.condition(LAMBDAS).films[index]
    torch.testing.assert_close(scale, 1 + table[:32].T, rtol=0, atol=0)
    torch.testing.assert_close(shift, table[32:].T, rtol=0, atol=0)
    # 0.25 is half way between the knots 0.2 and 0.3, 0.04 below the smallest positive one, 0 on its own.
    lam = torch.tensor([0.25, 0.7, 0.04, 0.0], dtype=torch.float64)
    cond = network.condition(lam)
    mixed = cond.films[index][1][cond.row_N]
    expected = [(shift[2] + shift[3]) / 2, (shift[4] + shift[5]) / 2, shift[1], shift[0]]
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("encoding", ["orthogonal", "fourier"])
def test_a_shared_trunk_and_the_head_of_a_site_make_its_scale_and_shift(encoding):
    network = disturbed("shared", encoding=encoding, film_rank=3)
    lam = LAMBDAS if encoding == "orthogonal" else torch.tensor([0.0, 0.05, 0.6], dtype=torch.float64)
    first = network.film_trunk[0]
    common = F.leaky_relu(network.encoder(lam) @ first.weight.T + first.bias)
    assert common.shape == (len(lam), 3)
    for site, film in zip(network.sites, network.condition(lam).films, strict=True):
        if site.film is not None:
            out = common @ site.film.output.weight.T + site.film.output.bias
            scale, shift = out.chunk(2, 1)
            torch.testing.assert_close(film, (1 + scale, shift), rtol=1e-10, atol=1e-10)


def test_the_outputs_of_a_shared_trunk_are_interpolated_between_the_knots():
    network = disturbed("shared")
    at_knots, between = network.condition(LAMBDAS), network.condition(torch.tensor([0.25, 0.35], dtype=torch.float64))
    for knots, film in zip(at_knots.films, between.films, strict=True):
        if film is not None:
            torch.testing.assert_close(film[0][0], (knots[0][2] + knots[0][3]) / 2, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(film[1][1], (knots[1][3] + knots[1][4]) / 2, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("film", ["table", "shared"])
def test_training_reaches_every_parameter_of_a_generator(film):
    network = disturbed(film).float()
    lam = torch.cat((LAMBDAS, LAMBDAS[1:]))
    network(torch.rand(11, 3, 8, 8), network.condition(lam)).square().sum().backward()
    generators = [p for n, p in network.named_parameters() if "film" in n]
    assert len(generators) == (7 if film == "table" else 2 * 7 + 2)
    assert all(p.grad.abs().sum() > 0 for p in generators)
