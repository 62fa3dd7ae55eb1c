"""The sections `model` and `conditioning` of a configuration: the network, and how it is told about lambda.

Standard library only, as `settings.py`, which has the other sections. "Paper" is Wang et al., "Once-for-All Adversarial
Training", NeurIPS 2020 (OAT).
"""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal

from oat_dist.errors import require

PAPER_LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)
_OF_FILM = ("film_rank", "film_start", "encoding", "encoding_width", "knots")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    name: Literal[
        "resnet8", "wrn10_2", "resnet18", "resnet34", "preactresnet18", "wrn16_8", "wrn28_10", "wrn34_10", "wrn40_2"
    ] = "resnet8"
    """CIFAR ResNet, pre-activation ResNet, or wide ResNet `wrn<depth>_<widening factor>`; any image size."""
    activation: Literal["relu", "silu"] = "relu"
    """After every norm: `relu` (paper), or the smooth `silu` (Xie et al., "Smooth Adversarial Training", 2020), which
    is not part of the fused operator."""
    dropout: float = 0.0
    """Share of values dropped after a block's second activation, wide and pre-activation networks (paper: 0.3)."""
    init: Literal["pytorch", "kaiming"] = "pytorch"
    """Start of convolutions and classifier: PyTorch's own (paper), or He normal by fan-out and a zero bias."""
    init_from: str | None = None
    """A .safetensors file whose weights training starts from: plain (film=none, norm=single) or conditional ones."""
    channels: tuple[int, ...] | None = None
    """Channels of the stem and of every stage; default: those of the network's name. An exported narrow network has
    them (launch/export.py)."""
    widths: tuple[float, ...] = (1.0,)
    """Widths that are trained together, increasing up to 1: shares of the channels of every layer (OATS of the paper;
    slimmable networks: Yu et al., ICLR 2019)."""
    width_rule: Literal["all", "sandwich"] = "all"
    """Widths of a training step: `all`, or the largest, the smallest and `width_samples` random ones (Yu and Huang,
    "Universally Slimmable Networks", ICCV 2019)."""
    width_samples: int = 2
    """Random widths of a step of the sandwich rule, keyed by seed and step (ICCV 2019: 2)."""
    width_heads: bool = False
    """A classifier of its own for every width (SOLAR: Tareen et al., arXiv:2509.16833) instead of a shared one."""

    def __post_init__(self) -> None:
        """Check ranges, and that the network has a place for dropout."""
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must lie in [0, 1)")
        self._check_widths()
        expected = f"must be 0 for model.name={self.name}; only the wide and pre-activation networks have dropout"
        require(self.dropout == 0 or self.name.startswith(("wrn", "preact")), "model.dropout", self.dropout, expected)

    def _check_widths(self) -> None:
        widths = self.widths
        ok = self.channels is None or (self.channels and all(c >= 1 for c in self.channels))
        require(bool(ok), "model.channels", self.channels, "must be positive numbers of channels")
        ok = all(0 < width <= 1 for width in widths) and all(a < b for a, b in pairwise(widths))
        require(ok, "model.widths", widths, "must increase and lie in (0, 1]")
        require(widths[-1:] == (1.0,), "model.widths", widths, "must end with 1, the whole network")
        ok = self.width_rule == "all" or len(widths) > 2
        require(ok, "model.width_rule", self.width_rule, f"needs three model.widths or more, there are {len(widths)}")
        require(self.width_samples >= 0, "model.width_samples", self.width_samples, "must be at least 0")
        ok = not self.width_heads or len(widths) > 1
        require(ok, "model.width_heads", self.width_heads, "needs several model.widths")


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """How lambda is drawn in training and how the network is told about it (paper, section 3)."""

    kind: Literal["film", "float"] = "film"
    """`film`: by FiLM and batch norm; `float`: by noise on the weights and batch norm, no FiLM (Kundu et al., "FLOAT",
    WACV 2023)."""
    distribution: Literal["discrete", "uniform", "beta"] = "discrete"
    """Distribution of lambda > 0 in training."""
    lambdas: tuple[float, ...] = PAPER_LAMBDAS
    """Values of the discrete distribution, increasing (paper, section 4.1)."""
    weights: tuple[float, ...] | None = None
    """Weights of `lambdas`, any positive scale; default equal."""
    zero_share: float = 0.1
    """Point mass at lambda = 0 of the uniform and beta distributions; of the discrete one it follows from `weights`."""
    low: float = 0.0
    """Lower end of the uniform distribution (excluded)."""
    high: float = 1.0
    """Upper end of the uniform distribution."""
    alpha: float = 1.0
    """First shape parameter of the beta distribution."""
    beta: float = 1.0
    """Second shape parameter of the beta distribution."""
    sampling: Literal["image", "batch"] = "image"
    """One lambda per image (paper, Algorithm 1) or one per global batch."""
    encoding: Literal["none", "onehot", "dct", "orthogonal", "fourier"] = "orthogonal"
    """Input of the FiLM generators: lambda itself, or its code (paper, section 3.2; random orthogonal is its best)."""
    encoding_width: int = 128
    """Length of the dct, orthogonal and fourier codes (paper: 128)."""
    knots: tuple[float, ...] | None = None
    """Lambdas that own a code when the distribution is continuous, increasing from 0; default `lambdas` if discrete."""
    film: Literal["mlp", "shared", "table", "none"] = "mlp"
    """Per-channel scale and shift: `mlp` from the code of lambda, a network per norm (paper, section 3.2); `shared`
    from one layer for all norms; `table` learnt for every knot, without a code; `none`."""
    film_rank: int = 4
    """Units of the shared layer of film=shared, the rank of scale and shift over lambda."""
    film_start: Literal["identity", "paper"] = "identity"
    """`identity`: scale 1 + output, last layer zero, so training starts unmodulated; `paper`: LeakyReLU on it."""
    norm: Literal["dual", "single", "shared_statistics"] = "dual"
    """`dual`: one batch norm for lambda = 0, another for lambda > 0 (paper, section 3.3); `shared_statistics`: separate
    scales and shifts, but the statistics of all images together."""
    noise_start: float = 0.25
    """Start of the learnt noise strength of every layer of kind=float (0.25 as in He et al., "Parametric Noise
    Injection", CVPR 2019)."""

    def __post_init__(self) -> None:
        """Check ranges and the combinations that cannot be trained."""
        check_lambdas("conditioning.lambdas", self.lambdas)
        if self.weights is not None:
            ok = len(self.weights) == len(self.lambdas) and all(w > 0 and math.isfinite(w) for w in self.weights)
            require(ok, "conditioning.weights", self.weights, f"must be {len(self.lambdas)} positive numbers")
        require(0 <= self.zero_share <= 1, "conditioning.zero_share", self.zero_share, "must lie in [0, 1]")
        require(0 <= self.low < self.high, "conditioning.low", self.low, "must satisfy 0 <= low < high")
        require(self.high <= 1, "conditioning.high", self.high, "lambda must lie in [0, 1]")
        require(self.alpha > 0, "conditioning.alpha", self.alpha, "must be positive")
        require(self.beta > 0, "conditioning.beta", self.beta, "must be positive")
        self._check_kind()
        self._check_encoding()
        if self.norm != "single":
            key = "conditioning.lambdas" if self.distribution == "discrete" else "conditioning.zero_share"
            value = self.lambdas if self.distribution == "discrete" else self.zero_share
            norm = f"conditioning.norm={self.norm}"
            expected = f"{norm} needs mass at lambda = 0 (else its first norm is never trained)"
            require(self.mass_at_zero > 0, key, value, expected)
            expected = f"{norm} needs lambdas > 0 (else its second norm is never trained)"
            require(self.mass_at_zero < 1, key, value, expected)

    def _check_kind(self) -> None:
        """Settings that belong to another kind of conditioning are at their defaults."""
        require(self.noise_start >= 0, "conditioning.noise_start", self.noise_start, "must be at least 0")
        require(self.film_rank >= 1, "conditioning.film_rank", self.film_rank, "must be at least 1")
        defaults = {f.name: f.default for f in fields(self)}
        foreign = ("noise_start",) if self.kind == "film" else _OF_FILM
        for key in foreign:
            value, default = getattr(self, key), defaults[key]
            expected = f"does not go with conditioning.kind={self.kind}; leave it at {default}"
            require(value == default, f"conditioning.{key}", value, expected)
        if self.kind == "film":
            return
        expected = "must be none with conditioning.kind=float, which has no FiLM"
        require(self.film == "none", "conditioning.film", self.film, expected)
        is_binary = self.distribution == "discrete" and self.lambdas == (0.0, 1.0)
        key = "lambdas" if self.distribution == "discrete" else "distribution"
        expected = "must be discrete, [0, 1], with conditioning.kind=float: its training knows no lambda between"
        require(is_binary, f"conditioning.{key}", getattr(self, key), expected)
        expected = "must be dual or single with conditioning.kind=float: its two forwards have no batch in common"
        require(self.norm != "shared_statistics", "conditioning.norm", self.norm, expected)

    def _check_encoding(self) -> None:
        width_key = "conditioning.encoding_width"
        require(self.encoding_width >= 1, width_key, self.encoding_width, "must be at least 1")
        if self.encoding == "fourier":
            require(self.encoding_width % 2 == 0, width_key, self.encoding_width, "must be even for fourier codes")
        if self.knots is not None:
            check_lambdas("conditioning.knots", self.knots)
            require(self.has_codes, "conditioning.knots", self.knots, f"encoding={self.encoding} has no knots")
        if self.film in ("shared", "table"):
            expected = f"must be identity with conditioning.film={self.film}; the paper has no such generator"
            require(self.film_start == "identity", "conditioning.film_start", self.film_start, expected)
        if self.film == "table":
            expected = "must be onehot, dct or orthogonal with conditioning.film=table, which needs knots"
            require(self.has_codes, "conditioning.encoding", self.encoding, expected)
        if self.has_codes and self.film != "none":
            expected = "must be given: discrete codes of a continuous distribution need knots, e.g. [0, 0.25, 0.5, 1]"
            require(self.code_lambdas is not None, "conditioning.knots", self.knots, expected)
            if self.distribution != "discrete" and self.mass_at_zero > 0:
                expected = "must begin with 0: lambda = 0 is drawn and owns a code"
                require(self.code_lambdas[0] == 0, "conditioning.knots", self.knots, expected)
            if self.encoding != "onehot" and self.film != "table":
                expected = f"must be at least the number of codes, {len(self.code_lambdas)}"
                require(self.encoding_width >= len(self.code_lambdas), width_key, self.encoding_width, expected)

    @property
    def mass_at_zero(self) -> float:
        """Probability of lambda = 0."""
        if self.distribution != "discrete":
            return self.zero_share
        if self.lambdas[0] != 0:
            return 0.0
        weights = self.weights or (1.0,) * len(self.lambdas)
        return weights[0] / sum(weights)

    @property
    def mass_at_one(self) -> float:
        """Probability of lambda = 1."""
        if self.distribution != "discrete" or self.lambdas[-1] != 1:
            return 0.0
        weights = self.weights or (1.0,) * len(self.lambdas)
        return weights[-1] / sum(weights)

    @property
    def has_codes(self) -> bool:
        """Whether the encoding is a table of codes (onehot, dct, orthogonal) rather than a function of lambda."""
        return self.encoding in ("onehot", "dct", "orthogonal")

    @property
    def code_lambdas(self) -> tuple[float, ...] | None:
        """Lambdas that own a code, increasing; None when the encoding is a function of lambda or knots are missing."""
        if not self.has_codes:
            return None
        return self.knots or (self.lambdas if self.distribution == "discrete" else None)


def check_lambdas(key: str, lambdas: tuple[float, ...]) -> None:
    """Require at least one lambda, increasing within [0, 1]."""
    require(len(lambdas) > 0, key, lambdas, "must name at least one lambda")
    require(all(0 <= lam <= 1 for lam in lambdas), key, lambdas, "every lambda must lie in [0, 1]")
    ok = all(a < b for a, b in pairwise(lambdas))
    require(ok, key, lambdas, "lambdas must increase, none twice")
