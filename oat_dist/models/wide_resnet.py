"""Wide ResNets (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, section 2), conditioned on lambda.

WRN-d-k: a stem of 16 channels and three stages of 16k, 32k and 64k channels with (d - 4) / 6 pre-activation blocks.
"""

from oat_dist.config import ConditioningConfig
from oat_dist.models.preact_resnet import PreActResNet
from oat_dist.models.slimming import WHOLE, Slimming

_STEM_WIDTH = 16


class WideResNet(PreActResNet):
    """A `PreActResNet` whose shape follows from depth and widening factor."""

    def __init__(
        self,
        cfg: ConditioningConfig,
        *,
        seed: int,
        in_channels: int,
        num_classes: int,
        depth: int,
        factor: int,
        widths: tuple[int, ...] | None = None,
        stem_width: int = _STEM_WIDTH,
        dropout: float = 0.0,
        slimming: Slimming = WHOLE,
    ) -> None:
        """Make the layers.

        Args:
            cfg: Conditioning.
            seed: Seed of the encoding tables.
            in_channels: Channels of the images.
            num_classes: Classes.
            depth: Convolutions and classifier, d = 6n + 4.
            factor: Widening factor k.
            widths: Channels of each stage in place of those that follow from the factor.
            stem_width: Channels of the stem.
            dropout: See `PreActResNet`; 0.3 in the paper's networks.
            slimming: See `PreActResNet`.
        """
        assert (depth - 4) % 6 == 0, f"depth {depth} is not 6n + 4"
        super().__init__(
            cfg,
            seed=seed,
            in_channels=in_channels,
            num_classes=num_classes,
            blocks=((depth - 4) // 6,) * 3,
            widths=widths or wide_channels(factor)[1:],
            stem_width=stem_width,
            dropout=dropout,
            slimming=slimming,
        )


def wide_channels(factor: int) -> tuple[int, ...]:
    """Channels of the stem and of each stage of a wide network."""
    return (_STEM_WIDTH, 16 * factor, 32 * factor, 64 * factor)
