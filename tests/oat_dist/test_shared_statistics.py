"""One set of statistics for all images, scales and shifts apart: against the definition and plain batch norm."""

import pytest
import torch
import torch.nn.functional as F

from kernels import film_dual_bn_reference
from oat_dist.config import ConditioningConfig, Config
from oat_dist.distributed import World
from oat_dist.models import build_model
from tests.ranks import run_ranks

LAM = torch.tensor([0, 0, 0.1, 0.4, 1], dtype=torch.float64)


def build(film="mlp", sync=False):
    config = Config(conditioning=ConditioningConfig(norm="shared_statistics", film=film))
    network = build_model(config, in_channels=3, num_classes=10).double()
    network.sync_statistics = sync
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen, dtype=torch.float64))
    return network


def images(num, channels=3, size=8):
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(num, channels, size, size, generator=gen, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("film", ["mlp", "none"])
def test_a_site_is_batch_norm_over_all_images_then_the_affine_of_the_group_then_film(film):
    network = build(film)
    site, cond = network.stem_norm, network.condition(LAM).joint()  # five clean images and three partners
    x, group = images(8, 16), torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    got = site(x, cond)
    mean, var = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    normed = F.batch_norm(x, mean, var, training=True)
    expected = normed * site.weight[group][:, :, None, None] + site.bias[group][:, :, None, None]
    scale, shift = cond.films[site.index] or (torch.ones_like(site.weight), torch.zeros_like(site.bias))
    row = cond.row_N if film == "mlp" else group
    expected = torch.relu(scale[row][:, :, None, None] * expected + shift[row][:, :, None, None])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((site.running_mean[0], site.running_var[0]), (mean, var), rtol=1e-10, atol=1e-10)
    assert site.running_mean.shape == (1, 16) and site.weight.shape == (2, 16)


def test_a_site_is_the_reference_operator_with_one_segment_per_forward_and_two_affine_groups():
    network = build()
    site, cond, x = network.blocks[0].norm2, network.condition(LAM), images(5, 16)
    mean, var = site.running_mean.clone().expand(2, -1).clone(), site.running_var.clone().expand(2, -1).clone()
    scale, shift = cond.films[site.index]
    residual, parts = images(5, 16) - 1, []
    for group in (0, 1):  # the statistics of all images, the affine of one group
        parts.append(
            film_dual_bn_reference(
                x, site.weight, site.bias, mean, var, segment=torch.zeros(5, dtype=torch.int32),
                group_of_segment=(group,), film_scale=scale, film_shift=shift, film_row=cond.row_N, residual=residual,
            )
        )  # fmt: skip
    expected = torch.cat((parts[0][:2], parts[1][2:]))
    torch.testing.assert_close(site(x, cond, residual=residual), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(site.running_mean[0], mean[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(site.running_var[0], var[1], rtol=1e-10, atol=1e-10)


def test_gradients_of_scale_and_shift_reach_the_group_of_the_image_alone():
    network = build()
    site, cond = network.stem_norm, network.condition(LAM)
    site(images(5, 16), cond)[:2].square().sum().backward()
    assert site.weight.grad[0].abs().sum() > 0 and site.bias.grad[0].abs().sum() > 0
    assert not site.weight.grad[1].any() and not site.bias.grad[1].any()


def test_a_frozen_network_answers_as_the_network_in_evaluation_mode():
    network, x = build(), images(5)
    network(images(8), network.condition(LAM).joint())
    frozen = network.attack_logits(x, network.freeze(network.condition(LAM)))
    torch.testing.assert_close(frozen, network.eval()(x, network.condition(LAM)), rtol=1e-10, atol=1e-10)


def on_ranks(world: World):
    """Logits and running mean of a forward whose images are dealt to the ranks."""
    network = build(sync=world.ranks > 1)
    mine = slice(world.rank, None, world.ranks)
    logits = network(images(5)[mine], network.condition(LAM[mine]))
    return logits.detach(), network.stem_norm.running_mean.clone()


@pytest.mark.dist
def test_statistics_shared_over_ranks_are_those_of_all_images_together():
    logits, mean = on_ranks(World())
    shared = run_ranks(on_ranks, 2)
    for rank, (part, rank_mean) in enumerate(shared):
        torch.testing.assert_close(part, logits[rank::2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rank_mean, mean, rtol=1e-9, atol=1e-9)
