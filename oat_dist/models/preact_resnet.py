"""CIFAR ResNets with pre-activation basic blocks (He et al., "Identity Mappings", ECCV 2016), conditioned on lambda.

FiLM follows every norm but the final one. Any image size and number of channels: the last pooling is global. The wide
networks of `wide_resnet.py` are these with other widths.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from oat_dist.config import ConditioningConfig
from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.slimming import WHOLE, Slimming


class PreActBlock(nn.Module):
    """norm - ReLU - conv - norm - ReLU - dropout - conv - add."""

    def __init__(
        self, net: ConditionalNetwork, in_channels: int, channels: int, stride: int, dropout: float = 0.0
    ) -> None:
        """Make the layers with the factories of `net`."""
        super().__init__()
        self.norm1 = net._norm(in_channels)
        self.conv1 = net._conv(in_channels, channels, 3, stride)
        self.norm2 = net._norm(channels)
        self.conv2 = net._conv(channels, channels, 3)
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut = net._conv(in_channels, channels, 1, stride) if changes_shape else None
        self.dropout = dropout

    def forward(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        """[N, C, H, W] -> [N, C', H / stride, W / stride]."""
        out = self.norm1(x, cond)
        residual = x if self.shortcut is None else self.shortcut(out, cond)
        out = self.norm2(self.conv1(out, cond), cond)
        return self.conv2(F.dropout(out, self.dropout, self.training), cond) + residual


class PreActResNet(ConditionalNetwork):
    """Stem convolution, stages of pre-activation blocks, final norm, global average pooling, linear classifier."""

    def __init__(
        self,
        cfg: ConditioningConfig,
        *,
        seed: int,
        in_channels: int,
        num_classes: int,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        stem_width: int | None = None,
        dropout: float = 0.0,
        slimming: Slimming = WHOLE,
    ) -> None:
        """Make the layers.

        Args:
            cfg: Conditioning.
            seed: Seed of the encoding tables.
            in_channels: Channels of the images.
            num_classes: Classes.
            blocks: Blocks of each stage; all stages but the first halve the resolution.
            widths: Channels of each stage.
            stem_width: Channels of the stem; default: those of the first stage.
            dropout: Share of values that training drops between a block's second activation and second convolution
                (Zagoruyko and Komodakis, section 2.4). The mask comes from torch's generator; `step.training_losses`
                seeds it by run, epoch and image.
            slimming: Shares of the channels that are networks of their own.
        """
        super().__init__(cfg, seed=seed, slimming=slimming)
        channels = stem_width or widths[0]
        self.stem = self._conv(in_channels, channels, 3, from_images=True)
        self.blocks = nn.ModuleList()
        for stage, (num_blocks, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(PreActBlock(self, channels, width, stride, dropout))
                channels = width
        self.final_norm = self._norm(channels, film=False)
        self.classifier = self._linear(channels, num_classes)
        self._number_sites()

    def _features(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        out = self.stem(x, cond)
        for block in self.blocks:
            out = block(out, cond)
        return self.final_norm(out, cond).mean((2, 3))
