"""Keyed draws: pure functions of the key, uniform, independent, equal to the published generator."""

import pytest
import torch

from oat_dist.random import draw_keys, integers, normal, permutation, random_bits, uniform


def splitmix64(state: int, count: int) -> list[int]:
    """The generator in sequence, in Python integers (Steele, Lea and Flood 2014, figure 14)."""
    mask, out = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_random_bits_are_the_published_splitmix64_sequence():
    # First value for state 0, as in the reference implementation by Vigna.
    assert splitmix64(0, 1) == [0xE220A8397B1DCDAF]
    for state in (0, 1, 2**63 + 12345):
        key = torch.tensor([state - 2**64 if state >= 2**63 else state])
        words = [int(w) % 2**64 for w in random_bits(key, 5)[0]]
        assert words == splitmix64(state, 5)


def test_a_draw_depends_on_its_own_key_alone():
    index = torch.tensor([5, 900, 17])
    together = uniform(draw_keys(1, "noise", 4, index), (2, 3))
    for i, at in enumerate(index):
        alone = uniform(draw_keys(1, "noise", 4, at[None]), (2, 3))
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("other", [(2, "noise", 4), (1, "shift", 4), (1, "noise", 5)])
def test_seed_purpose_and_epoch_each_change_every_draw(other):
    index = torch.arange(1000)
    first, second = (uniform(draw_keys(*key, index)) for key in ((1, "noise", 4), other))
    assert (first == second).float().mean() < 0.01
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 0.1


def test_uniform_draws_fill_the_unit_interval_evenly():
    u = uniform(draw_keys(0, "test", torch.arange(2000)), (50,)).flatten().double()
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    expected = len(u) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001


def test_integers_take_every_value_equally_often():
    drawn = integers(draw_keys(0, "test", torch.arange(9000)), 4, 3)
    counts = torch.bincount(drawn.flatten(), minlength=3)
    assert len(counts) == 3
    assert (counts - 12000).abs().max() < 400  # four standard deviations are 358


def test_normal_draws_have_mean_0_and_variance_1():
    z = normal(draw_keys(0, "test", torch.arange(1000)), (100,))
    assert abs(z.mean()) < 0.013
    assert abs(z.var() - 1) < 0.018


def test_a_permutation_has_every_number_once_and_changes_with_the_epoch():
    first, second = permutation(1000, 0, "order", 0), permutation(1000, 0, "order", 1)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert (first == second).float().mean() < 0.02
    assert torch.equal(first, permutation(1000, 0, "order", 0))


@pytest.mark.gpu
def test_draws_are_the_same_bits_on_cpu_and_gpu():
    index = torch.arange(1000)
    on_cpu = uniform(draw_keys(1, "noise", 4, index), (3, 8, 8))
    on_gpu = uniform(draw_keys(1, "noise", 4, index.cuda()), (3, 8, 8))
    assert torch.equal(on_cpu, on_gpu.cpu())
