"""Conditional networks by name."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from oat_dist.config import Config, ModelConfig
from oat_dist.errors import UserError, require
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.preact_resnet import PreActResNet
from oat_dist.models.resnet import ResNet
from oat_dist.models.slimming import Slimming, channels_at
from oat_dist.models.wide_resnet import WideResNet, wide_channels

_WIDTHS = (64, 128, 256, 512)

MODELS = {
    "resnet8": partial(ResNet, blocks=(1, 1, 1), widths=(16, 32, 64)),
    "resnet18": partial(ResNet, blocks=(2, 2, 2, 2), widths=_WIDTHS),
    "resnet34": partial(ResNet, blocks=(3, 4, 6, 3), widths=_WIDTHS),
    "preactresnet18": partial(PreActResNet, blocks=(2, 2, 2, 2), widths=_WIDTHS),
    "wrn10_2": partial(WideResNet, depth=10, factor=2),
    "wrn16_8": partial(WideResNet, depth=16, factor=8),
    "wrn28_10": partial(WideResNet, depth=28, factor=10),
    "wrn34_10": partial(WideResNet, depth=34, factor=10),
    "wrn40_2": partial(WideResNet, depth=40, factor=2),
}


def model_channels(cfg: ModelConfig) -> tuple[int, ...]:
    """Channels of the stem and of every stage, at width 1.

    Raises:
        UserError: `model.channels` do not fit the network, or a narrow one of `model.widths` leaves a layer without.
    """
    made = MODELS[cfg.name]
    if made.func is WideResNet:
        own = wide_channels(made.keywords["factor"])
    else:
        stages = made.keywords["widths"]
        own = (made.keywords.get("stem_width") or stages[0], *stages)
    channels = own if cfg.channels is None else cfg.channels
    expected = f"must be {len(own)} numbers, for stem and stages of model.name={cfg.name}, e.g. {list(own)}"
    require(len(channels) == len(own), "model.channels", channels, expected)
    if made.func is ResNet:
        expected = f"the first two must be equal: in model.name={cfg.name} the stem has the channels of the first stage"
        require(channels[0] == channels[1], "model.channels", channels, expected)
    expected = f"leaves a layer of {min(channels)} channels without any; {cfg.name} has {list(channels)}"
    require(channels_at(min(channels), cfg.widths[0]) >= 1, "model.widths", cfg.widths, expected)
    return channels


def build_model(
    config: Config,
    *,
    in_channels: int,
    num_classes: int,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> ConditionalNetwork:
    """The network of a configuration, initialised from its seed; the global random state is left as it was.

    Args:
        config: Configuration of the run. `model.init_from` is not read here; see `init_from.initialise_from`.
        in_channels: Channels of the images.
        num_classes: Classes.
        pixel_mean: Mean of each channel over the training split, in [0, 1]; used with `data.normalise` alone. Without
            it the network normalises by 0 and 1 until it loads weights, which carry both statistics.
        pixel_std: Standard deviation of each channel, given exactly when `pixel_mean` is.

    Returns:
        The network on the CPU, float32, in training mode, its convolution weights channels last in memory.

    Raises:
        UserError: Channels or widths that the network cannot have, or pixel statistics that do not fit the images.
    """
    cfg = config.model
    options: dict[str, Any] = {"slimming": Slimming(widths=cfg.widths, heads=cfg.width_heads)}
    stem, *stages = model_channels(cfg)
    if cfg.channels is not None:
        options["widths"] = tuple(stages)
        if MODELS[cfg.name].func is not ResNet:
            options["stem_width"] = stem
    if cfg.dropout:
        options["dropout"] = cfg.dropout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = MODELS[config.model.name](
            config.conditioning, seed=config.seed, in_channels=in_channels, num_classes=num_classes, **options
        )
        if config.model.init == "kaiming":
            _start_kaiming(network)
    if config.data.normalise:
        mean = (0.0,) * in_channels if pixel_mean is None else pixel_mean
        std = (1.0,) * in_channels if pixel_std is None else pixel_std
        if len(mean) != in_channels or len(std) != in_channels:
            raise UserError(f"data.normalise=True: {len(mean)} means, {len(std)} deviations, {in_channels} channels")
        network.normalise_pixels(mean, std)
    for site in network.sites:
        site.activation = cfg.activation
    network.sync_statistics = config.engine.sync_statistics
    network.noise_draws = config.evaluation.num_noise_draws
    return network.to(memory_format=torch.channels_last)


def _start_kaiming(network: ConditionalNetwork) -> None:
    """He et al., "Delving Deep into Rectifiers" (ICCV 2015), section 2.2, backward form; FiLM keeps its own start."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for module in network.classifier.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
