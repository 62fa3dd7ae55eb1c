"""The configurations of real runs: they load, are one recipe, and say truly what they cost."""

import pathlib
import re

import pytest

from oat_dist.config import Config
from oat_dist.config_io import load_config
from oat_dist.cost import training_cost

CONFIGS = pathlib.Path(__file__).parents[2] / "launch/configs"
SHAPES = {
    "cifar10_resnet34": (32, 45_000),
    "cifar10_resnet18": (32, 45_000),
    "svhn_wrn16_8": (32, 68_257),
    "stl10_wrn40_2": (96, 4_500),
}
ALL = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load(name) -> Config:
    return load_config(["--config", str(CONFIGS / f"{name}.yaml")])


def test_every_configuration_loads_and_is_named_after_its_file():
    assert set(SHAPES) < set(ALL)
    assert [load(name).name for name in ALL] == ALL


@pytest.mark.parametrize("name", SHAPES)
def test_real_runs_have_the_recipe_of_this_repository_and_the_data_and_network_of_their_name(name):
    config = load(name)
    assert name == f"{config.data.dataset}_{config.model.name}"
    told, tried, optim = config.conditioning, load("cifar10_8k_wrn10_2").conditioning, config.optim
    assert (told.film_start, told.norm) == ("identity", "dual")
    assert (told.film, told.weights) == (tried.film, tried.weights)
    assert (optim.optimizer, optim.nesterov, optim.schedule, optim.decay) == ("sgd", True, "onecycle", "weights")
    assert 0 < optim.ema_decay < 1 and optim.epochs < 200
    assert config.engine.precision == "bf16" and optim.epochs % config.evaluation.interval_epochs == 0


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_says_what_its_run_costs(name):
    (size, num_train_images), config = SHAPES[name], load(name)
    cost = training_cost(
        config, in_channels=3, image_size=(size, size), num_classes=10, num_train_images=num_train_images
    )
    text = (CONFIGS / f"{name}.yaml").read_text()
    flops, hours = (re.search(pattern, text)[1] for pattern in (r"(\S+) FLOPs by", r"(\S+) GPU-hours expected"))
    assert float(flops) == pytest.approx(cost.flops, rel=2e-3)
    assert float(hours) == round(cost.flops / 120e12 / 3600, 2)
    steps = optim_steps(config, num_train_images)
    assert f"our choice, {steps:,} steps." in text
    assert (
        f"| {name} | {config.optim.epochs} | {cost.units_per_image:.2f} | {flops} | {hours} |"
        in (CONFIGS.parents[1] / "docs/reproduction.md").read_text()
    )


def optim_steps(config: Config, num_train_images: int) -> int:
    """Optimiser steps of a run."""
    return config.optim.epochs * config.steps_per_epoch(num_train_images)
