"""One training step of each published configuration on a CPU, and what the configurations have in common."""

import dataclasses
import pathlib

import pytest
import torch

from oat_dist.config import PAPER_LAMBDAS, Config
from oat_dist.config_io import load_config
from oat_dist.data import Batch
from oat_dist.losses import attack_plan
from oat_dist.models import build_model
from oat_dist.step import training_losses

CONFIGS = pathlib.Path(__file__).parents[2] / "launch/configs"
NUM_PARAMETERS = {
    "cifar10_resnet34_published": 33_355_466,
    "svhn_wrn16_8_published": 16_228_922,
    "stl10_wrn40_2_published": 3_886_394,
}


def load(name) -> Config:
    return load_config(["--config", str(CONFIGS / f"{name}.yaml")])


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_one_step_has_a_finite_loss_and_a_gradient_for_every_parameter_of_the_published_network(name):
    config = load(name)
    config = dataclasses.replace(config, attack=dataclasses.replace(config.attack, steps=1))
    network = build_model(config, in_channels=3, num_classes=10)
    assert sum(p.numel() for p in network.parameters()) == NUM_PARAMETERS[name]
    lam = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=torch.float64)
    batch = Batch(
        # STL-10 crops of 32 x 32 take a ninth of the time.
        image_NCHW=torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        label_N=torch.arange(4),
        index_N=torch.arange(4),
        position_N=torch.arange(4),
    )
    losses = training_losses(network, batch, lam, config=config, epoch=0, forward=network)
    losses.loss_N.mean().backward()
    assert losses.loss_N.isfinite().all()
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().sum() > 0, path


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_the_recipe_is_the_published_one(name):
    config = load(name)
    assert config.name == name and name.startswith(f"{config.data.dataset}_{config.model.name}")
    optim = config.optim
    assert (optim.optimizer, optim.lr, optim.momentum, optim.nesterov) == ("sgd", 0.1, 0.9, False)
    assert (optim.weight_decay, optim.epochs, optim.batch_size, optim.schedule) == (5e-4, 200, 128, "cosine")
    assert (optim.ema_decay, optim.warmup_share, optim.clip_norm) == (0, 0, 0)
    attack = attack_plan(config)
    assert (attack.norm, attack.eps, attack.steps) == ("linf", 8 / 255, 7)
    assert attack.step_size == pytest.approx(10 / 255 / 7)
    assert (attack.start, attack.start_size, attack.project) == ("uniform", 8 / 255, True)
    told = config.conditioning
    assert told.lambdas == PAPER_LAMBDAS and told.mass_at_zero == pytest.approx(1 / 6)
    assert (told.encoding, told.encoding_width, told.film_start, told.norm) == ("orthogonal", 128, "paper", "dual")
    assert config.model.dropout == (0.3 if config.model.name.startswith("wrn") else 0)
    assert not config.data.normalise and config.model.init == "pytorch"
    assert (config.data.shift_pixels, config.data.flip) == ((0, False) if config.data.dataset == "svhn" else (4, True))
