"""CIFAR ResNets with post-activation basic blocks (He et al., CVPR 2016, section 4.2), conditioned on lambda.

FiLM follows every norm but the shortcut's. Any image size and number of channels: the last pooling is global.
"""

from torch import Tensor, nn

from oat_dist.config import ConditioningConfig
from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.slimming import WHOLE, Slimming


class BasicBlock(nn.Module):
    """conv - norm - ReLU - conv - norm - add - ReLU."""

    def __init__(self, net: ConditionalNetwork, in_channels: int, channels: int, stride: int) -> None:
        """Make the layers with the factories of `net`."""
        super().__init__()
        self.conv1 = net._conv(in_channels, channels, 3, stride)
        self.norm1 = net._norm(channels)
        self.conv2 = net._conv(channels, channels, 3)
        self.norm2 = net._norm(channels)
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut = net._conv(in_channels, channels, 1, stride) if changes_shape else None
        self.shortcut_norm = net._norm(channels, film=False) if changes_shape else None

    def forward(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        """[N, C, H, W] -> [N, C', H / stride, W / stride]."""
        residual = x if self.shortcut is None else self.shortcut_norm(self.shortcut(x, cond), cond, activate=False)
        out = self.norm1(self.conv1(x, cond), cond)
        return self.norm2(self.conv2(out, cond), cond, residual=residual)


class ResNet(ConditionalNetwork):
    """Stem convolution, stages of basic blocks, global average pooling, linear classifier."""

    def __init__(
        self,
        cfg: ConditioningConfig,
        *,
        seed: int,
        in_channels: int,
        num_classes: int,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        slimming: Slimming = WHOLE,
    ) -> None:
        """Make the layers.

        Args:
            cfg: Conditioning.
            seed: Seed of the encoding tables.
            in_channels: Channels of the images.
            num_classes: Classes.
            blocks: Blocks of each stage; all stages but the first halve the resolution.
            widths: Channels of each stage; the stem has those of the first.
            slimming: Shares of the channels that are networks of their own.
        """
        super().__init__(cfg, seed=seed, slimming=slimming)
        self.stem = self._conv(in_channels, widths[0], 3, from_images=True)
        self.stem_norm = self._norm(widths[0])
        self.blocks = nn.ModuleList()
        channels = widths[0]
        for stage, (num_blocks, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(BasicBlock(self, channels, width, stride))
                channels = width
        self.classifier = self._linear(channels, num_classes)
        self._number_sites()

    def _features(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        out = self.stem_norm(self.stem(x, cond), cond)
        for block in self.blocks:
            out = block(out, cond)
        return out.mean((2, 3))
