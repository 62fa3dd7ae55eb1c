"""Conditional networks by name."""

from functools import partial

import torch

from oat_dist.config import Config
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.resnet import ResNet
from oat_dist.models.wide_resnet import WideResNet

MODELS = {
    "resnet8": partial(ResNet, blocks=(1, 1, 1), widths=(16, 32, 64)),
    "wrn10_2": partial(WideResNet, blocks=(1, 1, 1), widths=(32, 64, 128)),
}


def build_model(config: Config, *, in_channels: int, num_classes: int) -> ConditionalNetwork:
    """The network of a configuration, initialised from its seed; the global random state is left as it was.

    Args:
        config: Configuration of the run.
        in_channels: Channels of the images.
        num_classes: Classes.

    Returns:
        The network on the CPU, float32, in training mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = MODELS[config.model.name](
            config.conditioning, seed=config.seed, in_channels=in_channels, num_classes=num_classes
        )
    network.sync_statistics = config.engine.sync_statistics
    return network
