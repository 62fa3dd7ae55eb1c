"""PGD: constraints, definition, strength, keyed starts, restored modes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oat_dist.attacks import NORMS, evaluation_mode, pgd
from oat_dist.config import default_step_size
from oat_dist.random import draw_keys

GEN = torch.Generator().manual_seed(0)
X = torch.rand(6, 3, 5, 5, generator=GEN, dtype=torch.float64)
LABEL = torch.randint(4, (6,), generator=GEN)
LINEAR = torch.randn(4, 75, generator=GEN, dtype=torch.float64)
KEY = draw_keys(0, "test", torch.arange(6))


def linear(x):
    return x.flatten(1) @ LINEAR.T


def nonlinear(x):
    return torch.tanh(x.flatten(1) @ LINEAR.T) * 3


def length(delta, norm):
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", [None, KEY], ids=["at the image", "random start"])
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.7])
def test_adversarial_images_stay_in_the_ball_and_in_the_pixel_range(norm, start, eps):
    x_adv = pgd(nonlinear, X, LABEL, eps=eps, steps=5, norm=norm, start_key=start)
    assert (length(x_adv - X, norm) <= eps + 1e-12).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert not x_adv.requires_grad


def test_linf_steps_equal_the_definition_written_out():
    eps, steps, size = 0.1, 4, 0.04
    expected = X.clone()
    for _ in range(steps):
        expected = expected.detach().requires_grad_(True)
        F.cross_entropy(nonlinear(expected), LABEL).backward()
        expected = expected.detach() + size * expected.grad.sign()
        expected = torch.min(torch.max(expected, X - eps), X + eps).clamp(0, 1)
    x_adv = pgd(nonlinear, X, LABEL, eps=eps, steps=steps, step_size=size)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)


def test_l2_steps_equal_the_definition_written_out():
    eps, steps, size = 0.6, 3, 0.3
    expected = X.clone()
    for _ in range(steps):
        expected = expected.detach().requires_grad_(True)
        F.cross_entropy(nonlinear(expected), LABEL, reduction="sum").backward()
        moved = [a + size * g / g.norm() for a, g in zip(expected.detach(), expected.grad, strict=True)]
        back = [x + (m - x) * min(1.0, eps / float((m - x).norm())) for m, x in zip(moved, X, strict=True)]
        expected = torch.stack(back).clamp(0, 1)
    x_adv = pgd(nonlinear, X, LABEL, eps=eps, steps=steps, step_size=size, norm="l2")
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_finds_the_best_perturbation_of_a_linear_classifier(norm):
    two = torch.stack((LINEAR[0], -LINEAR[0]))
    x, label, eps = torch.full((2, 3, 5, 5), 0.5, dtype=torch.float64), torch.tensor([0, 1]), 0.2
    x_adv = pgd(lambda v: v.flatten(1) @ two.T, x, label, eps=eps, steps=40, norm=norm)
    dual = LINEAR[0].abs().sum() if norm == "linf" else LINEAR[0].norm()
    drop = (x - x_adv).flatten(1) @ LINEAR[0] * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(drop, eps * dual.expand(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball_and_follow_the_key(norm):
    key = draw_keys(0, "test", torch.arange(4000))
    start = NORMS[norm].start(key, (1, 2, 2))
    assert torch.equal(start[7], NORMS[norm].start(key[7:8], (1, 2, 2))[0])
    radius = length(start, norm)
    assert radius.max() <= 1 + 1e-6
    # Uniform in a 4-dimensional ball: the radius to the power 4 is uniform in [0, 1].
    assert abs((radius**4).double().mean() - 0.5) < 0.02
    assert start.mean((0, 1)).abs().max() < 0.04


def test_an_image_is_attacked_the_same_alone_as_in_a_batch():
    together = pgd(nonlinear, X, LABEL, eps=0.1, steps=5, start_key=KEY)
    alone = pgd(nonlinear, X[2:3], LABEL[2:3], eps=0.1, steps=5, start_key=KEY[2:3])
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-12)


def test_the_default_step_size_is_the_papers():
    assert default_step_size(8 / 255, 7) == pytest.approx(10 / 255 / 7)
    assert default_step_size(76.5 / 255, 7) == pytest.approx(80.5 / 255 / 7)
    default = pgd(nonlinear, X, LABEL, eps=0.1, steps=3)
    explicit = pgd(nonlinear, X, LABEL, eps=0.1, steps=3, step_size=(0.1 + 4 / 255) / 3)
    assert torch.equal(default, explicit)


def test_no_gradient_reaches_the_parameters():
    layer = nn.Linear(75, 4, dtype=torch.float64)
    pgd(lambda x: layer(x.flatten(1)), X, LABEL, eps=0.1, steps=2)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_an_attack_works_inside_no_grad_and_on_no_images():
    with torch.no_grad():
        x_adv = pgd(linear, X, LABEL, eps=0.1, steps=2)
    assert not torch.equal(x_adv, X)
    assert pgd(linear, X[:0], LABEL[:0], eps=0.1, steps=2).shape == (0, 3, 5, 5)


@pytest.mark.parametrize("wrong", [{"norm": "l7"}, {"eps": -0.1}, {"steps": 0}])
def test_a_wrong_argument_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        pgd(linear, X, LABEL, **{"eps": 0.1, "steps": 2, **wrong})


def test_evaluation_mode_restores_every_modules_own_mode_even_after_an_error():
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(2), nn.Dropout()))
    network[1][0].eval()
    with pytest.raises(RuntimeError, match="stop"), evaluation_mode(network):
        assert not any(m.training for m in network.modules())
        raise RuntimeError("stop")
    assert [m.training for m in network.modules()] == [True, True, True, False, True]
