"""Networks with another activation than ReLU, in training, under attack, cut out and deployed."""

import pytest
import torch
import torch.nn.functional as F

from oat_dist.config import AttackConfig, Config, ModelConfig
from oat_dist.data import Batch
from oat_dist.export import cut_out
from oat_dist.models import MODELS, build_model
from oat_dist.models.norm import FiLMDualBN2d
from oat_dist.step import training_losses
from tests.oat_dist.test_deployment import assert_close, assert_deployed_agrees, build, images, make


def exchanged(monkeypatch):
    """Let every ReLU of a network be a SiLU, outside of the site."""
    forward = FiLMDualBN2d.forward

    def with_silu(self, x, cond, residual=None, activate=True):
        y = forward(self, x, cond, residual, activate=False)
        return F.silu(y) if activate else y

    monkeypatch.setattr(FiLMDualBN2d, "forward", with_silu)


@pytest.mark.parametrize("name", ["resnet8", "preactresnet18", "wrn10_2"])
def test_silu_stands_where_the_relu_stood_in_training_and_at_test_time(name, monkeypatch):
    smooth, lam = build(make(name, activation="silu")), torch.tensor([0, 0.1, 0.3, 1, 0, 0.7], dtype=torch.float64)
    plain = build(make(name))
    plain.load_state_dict(smooth.state_dict())
    order, ways = lam.argsort(), []
    for network in (smooth, plain):
        if network is plain:
            assert not torch.allclose(plain.predict(images(), lam), ways[0][0])
            exchanged(monkeypatch)
        cond = network.condition(lam[order])
        ways.append((network.predict(images(), lam), network.train()(images()[order], cond)))
    for found, wanted in zip(*ways, strict=True):
        assert_close(found, wanted, 1e-12)


def test_a_step_of_training_attacks_and_learns_through_silu():
    config = Config(model=ModelConfig(activation="silu"), attack=AttackConfig(eps_255=16.0, steps=2))
    network = build_model(config, in_channels=3, num_classes=5).double()
    label, lam = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0.1, 0.4, 1], dtype=torch.float64)
    batch = Batch(image_NCHW=images(4), label_N=label, index_N=torch.arange(4), position_N=torch.arange(4))
    losses = training_losses(network, batch, lam, config=config, epoch=0, forward=network).loss_N
    losses.sum().backward()
    assert losses.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in network.named_parameters() if "stem.weight" in n)


@pytest.mark.parametrize("name", MODELS)
def test_deployed_networks_keep_their_activation(name):
    network = build(make(name, activation="silu"))
    assert_deployed_agrees(network, torch.float64, folded=(0.0, 0.25))


def test_a_width_that_is_cut_out_keeps_its_activation():
    network = build(make("resnet8", activation="silu", widths=(0.5, 1.0)))
    assert_close(cut_out(network, 0.5).predict(images(), 0.3), network.predict(images(), 0.3, width=0.5))
