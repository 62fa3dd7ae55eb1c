"""Wide ResNets with pre-activation blocks (Zagoruyko and Komodakis, BMVC 2016, section 2), conditioned on lambda.

FiLM follows every norm but the final one. Any image size and number of channels: the last pooling is global.
"""

from torch import Tensor, nn

from oat_dist.config import ConditioningConfig
from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.network import ConditionalNetwork


class WideBlock(nn.Module):
    """norm - ReLU - conv - norm - ReLU - conv - add."""

    def __init__(self, net: ConditionalNetwork, in_channels: int, channels: int, stride: int) -> None:
        """Make the layers with the factories of `net`."""
        super().__init__()
        self.norm1 = net._norm(in_channels)
        self.conv1 = net._conv(in_channels, channels, 3, stride)
        self.norm2 = net._norm(channels)
        self.conv2 = net._conv(channels, channels, 3)
        self.shortcut = net._conv(in_channels, channels, 1, stride) if in_channels != channels else None

    def forward(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        """[N, C, H, W] -> [N, C', H / stride, W / stride]."""
        out = self.norm1(x, cond)
        residual = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.norm2(self.conv1(out), cond)) + residual


class WideResNet(ConditionalNetwork):
    """Stem convolution, stages of wide blocks, final norm, global average pooling, linear classifier."""

    def __init__(
        self,
        cfg: ConditioningConfig,
        *,
        seed: int,
        in_channels: int,
        num_classes: int,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
    ) -> None:
        """Make the layers.

        Args:
            cfg: Conditioning.
            seed: Seed of the encoding tables.
            in_channels: Channels of the images.
            num_classes: Classes.
            blocks: Blocks of each stage; all stages but the first halve the resolution.
            widths: Channels of each stage; the stem has 16.
        """
        super().__init__(cfg, seed=seed)
        channels = 16
        self.stem = self._conv(in_channels, channels, 3)
        self.blocks = nn.ModuleList()
        for stage, (num_blocks, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(WideBlock(self, channels, width, stride))
                channels = width
        self.final_norm = self._norm(channels, film=False)
        self.classifier = nn.Linear(channels, num_classes)
        self._number_sites()

    def forward(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        """Logits [N, K] of images [N, C, H, W] in [0, 1]."""
        out = self.stem(x)
        for block in self.blocks:
            out = block(out, cond)
        return self.classifier(self.final_norm(out, cond).mean((2, 3)))
