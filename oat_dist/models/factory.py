"""The layers that networks are built from, as the conditioning and the widths want them."""

from collections.abc import Mapping

from torch import nn

from oat_dist.conditioning import LambdaEncoder
from oat_dist.config import ConditioningConfig
from oat_dist.models.film import FiLMGenerator, FiLMHead, FiLMTable, Generator, trunk
from oat_dist.models.layers import SlimmableConv2d, SlimmableLinear
from oat_dist.models.norm import FiLMDualBN2d
from oat_dist.models.slimming import WHOLE, Slimming, channels_at


class LayerFactory(nn.Module):
    """Makes convolutions, norms and classifiers; channels are those of width 1.

    Attributes:
        cfg: Encoding, FiLM and norm.
        slimming: Widths.
        encoder: Codes of lambda, or None without FiLM.
        film_trunk: What the heads of film=shared have in common, or None.
    """

    def __init__(self, cfg: ConditioningConfig, *, seed: int, slimming: Slimming = WHOLE) -> None:
        """Make what all layers share.

        Args:
            cfg: Encoding, FiLM and norm.
            seed: Seed of the encoding tables.
            slimming: Widths.
        """
        super().__init__()
        self.cfg, self.slimming = cfg, slimming
        self.encoder = LambdaEncoder(cfg, seed=seed) if cfg.film != "none" else None
        self.film_trunk = trunk(self.encoder.width, cfg.film_rank) if cfg.film == "shared" else None

    @property
    def is_stochastic(self) -> bool:
        """Whether weights have noise for lambda > 0."""
        return self.cfg.kind == "float"

    def _conv(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, from_images: bool = False
    ) -> SlimmableConv2d:
        return SlimmableConv2d(
            in_channels, out_channels, kernel, stride, from_images=from_images, noise_start=self._noise_start
        )

    def _linear(self, in_features: int, out_features: int) -> SlimmableLinear:
        narrow = self._narrow(in_features) if self.slimming.heads else None
        return SlimmableLinear(in_features, out_features, narrow=narrow, noise_start=self._noise_start)

    def _norm(self, channels: int, film: bool = True) -> FiLMDualBN2d:
        generator = self._film(channels) if film else None
        return FiLMDualBN2d(channels, **self._norm_groups, film=generator, narrow=self._narrow(channels))

    def _film(self, channels: int) -> Generator | None:
        """A generator of the configured kind, or None without FiLM."""
        if self.encoder is None:
            return None
        if self.cfg.film == "shared":
            return FiLMHead(self.cfg.film_rank, channels, self.cfg.film_start)
        if self.cfg.film == "table":
            return FiLMTable(len(self.encoder.knots), channels, self.cfg.film_start)
        return FiLMGenerator(self.encoder.width, channels, self.cfg.film_start)

    @property
    def _norm_groups(self) -> Mapping[str, int]:
        """Arguments of a site that say how many norms it has."""
        num_groups = 1 if self.cfg.norm == "single" else 2
        return {"num_groups": num_groups, "num_statistics": num_groups if self.cfg.norm == "dual" else 1}

    @property
    def _noise_start(self) -> float | None:
        return self.cfg.noise_start if self.is_stochastic else None

    def _narrow(self, channels: int) -> dict[float, int]:
        return {width: channels_at(channels, width) for width in self.slimming.narrow}
