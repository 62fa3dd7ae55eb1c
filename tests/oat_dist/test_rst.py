"""Robust self-training: its losses by hand, its perturbations, and what it refuses."""

import dataclasses

import pytest
import torch

from oat_dist.adversary import attack_images
from oat_dist.config import AttackConfig, Config, DataConfig, LossConfig
from oat_dist.errors import UserError
from oat_dist.losses import Examples, attack_plan, robust_term
from oat_dist.models import build_model
from oat_dist.random import draw_keys, normal


def make(robust="rst_adv", attack=None, extra="more", **loss) -> Config:
    return Config(data=DataConfig(extra=extra), loss=LossConfig(robust=robust, **loss), attack=attack or AttackConfig())


@pytest.mark.parametrize("robust", ["rst_adv", "rst_stab"])
def test_the_loss_is_the_clean_cross_entropy_and_beta_times_the_divergence(robust):
    gen = torch.Generator().manual_seed(0)
    clean, perturbed = torch.randn(2, 5, 4, generator=gen, dtype=torch.float64)
    label = torch.tensor([0, 3, 1, 2, 2])
    for config, beta in ((make(robust), 6.0), (make(robust, settings={"beta": 2.5}), 2.5)):
        objective = robust_term(config)
        got = objective.loss(
            Examples(label_A=label, clean_logits_AK=clean, adversarial_logits_AK=perturbed, settings=objective.settings)
        )
        p, q = clean.softmax(1), perturbed.softmax(1)
        expected = -p[torch.arange(5), label].log() + beta * (p * (p / q).log()).sum(1)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_adversarial_form_has_the_attack_of_trades():
    trades = Config(loss=LossConfig(robust="trades"))
    assert attack_plan(make()) == attack_plan(trades)


def images_of(config, x, index=None):
    network = build_model(config, in_channels=1, num_classes=10)
    frozen = network.freeze(network.condition(torch.ones(len(x))))
    index, label = torch.arange(len(x)) if index is None else index, torch.zeros(len(x), dtype=torch.int64)
    return attack_images(network, frozen, x, label, index, config=config, epoch=4)


def test_the_stable_form_adds_keyed_gaussian_noise_beyond_the_ball_and_takes_no_gradient(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("a gradient was taken"))
    config, x = make("rst_stab"), torch.full((40, 1, 8, 8), 0.5)
    noisy = images_of(config, x)
    expected = 0.5 + 0.25 * normal(draw_keys(0, "random start", 4, torch.arange(40)), (1, 8, 8))
    assert torch.equal(noisy, expected.clamp(0, 1))
    assert float((noisy - x).abs().max()) > config.attack.eps
    unclamped = noisy[(noisy > 0) & (noisy < 1)]
    assert float((unclamped - 0.5).std()) == pytest.approx(0.23, abs=0.02)
    assert torch.equal(images_of(config, x[:3], torch.tensor([7, 0, 9])), noisy[[7, 0, 9]])


@pytest.mark.parametrize(
    ("config", "message"),
    [(make(extra=None), "data.extra=None: must name a data set with pseudo-labels, which loss.robust=rst_adv trains"),
     (make("rst_stab", extra=None), "data.extra=None: must name a data set with pseudo-labels, which loss.robust="),
     (make("rst_stab", AttackConfig(steps=3)), "attack.steps=3: must be left out with loss.robust=rst_stab"),
     (make("rst_stab", AttackConfig(random_start=False)), "attack.random_start=False: must be true (or left out) wi"),
     (make(settings={"gamma": 1.0}), "loss.settings.gamma=1.0: the settings of loss.robust=rst_adv: loss.settings.b"),
     (make(clean_at_one=False), "loss.clean_at_one=False: must be true with loss.robust=rst_adv")],
)  # fmt: skip
def test_what_does_not_go_with_robust_self_training_is_named(config, message):
    with pytest.raises(UserError) as error:
        robust_term(config)
    assert str(error.value).startswith(message)


def test_lambda_may_drive_beta():
    config = make(condition_on="beta")
    assert dataclasses.replace(robust_term(config)).conditionable == ("beta",)
