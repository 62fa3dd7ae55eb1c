"""The sections of a configuration: names, units, defaults and ranges of every setting, as frozen dataclasses.

Standard library only. `config.py` puts the sections together. "Paper" is Wang et al., "Once-for-All Adversarial
Training", NeurIPS 2020 (OAT).
"""

import math
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Literal

from oat_dist.errors import require

PAPER_LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)
_OF_FILM = ("film_rank", "film_start", "encoding", "encoding_width", "knots")


def default_step_size(eps: float, steps: int) -> float:
    """min(1.25 eps, eps + 4/255) / steps: the default step size of a PGD attack, in pixel units of [0, 1]."""
    return min(1.25 * eps, eps + 4 / 255) / max(steps, 1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are read."""

    dataset: str = "digits"
    """Name of a prepared data set: the folder `data.root`/`data.dataset`. `digits` is prepared on first use."""
    root: str = "data"
    """Folder that holds the prepared data sets."""
    loader: Literal["ffcv", "memory"] = "ffcv"
    """`ffcv` streams .beton files; `memory` keeps the whole split on the device. Both give bit-equal batches."""
    workers: int = 1
    """Decoding threads per rank of the ffcv loader."""
    shift_pixels: int | None = None
    """Random translation of training images by up to this many pixels each way, zeros shifted in; default: the data
    set's own (CIFAR, STL-10, folder and npz 4, SVHN 0, digits 1)."""
    flip: bool | None = None
    """Random left-right flip of training images; default: the data set's own (not for SVHN and digits)."""
    extra: str | None = None
    """A further prepared data set that every batch has a share of, e.g. with pseudo-labels (launch/pseudo_label.py)."""
    extra_share: float = 0.5
    """Share of every batch that comes from `data.extra`; an epoch remains a pass over `data.dataset`."""
    extra_weight: float = 1.0
    """Weight of the losses of those images."""
    normalise: bool = False
    """Subtract the training split's mean and divide by its deviation, per channel, inside the network (paper: no)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.workers >= 1, "data.workers", self.workers, "must be at least 1")
        ok = self.shift_pixels is None or self.shift_pixels >= 0
        require(ok, "data.shift_pixels", self.shift_pixels, "must be at least 0")
        require(0 < self.extra_share < 1, "data.extra_share", self.extra_share, "must lie in (0, 1)")
        require(self.extra_weight >= 0, "data.extra_weight", self.extra_weight, "must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    name: Literal[
        "resnet8", "wrn10_2", "resnet18", "resnet34", "preactresnet18", "wrn16_8", "wrn28_10", "wrn34_10", "wrn40_2"
    ] = "resnet8"
    """CIFAR ResNet, pre-activation ResNet, or wide ResNet `wrn<depth>_<widening factor>`; any image size."""
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
        _check_lambdas("conditioning.lambdas", self.lambdas)
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
            _check_lambdas("conditioning.knots", self.knots)
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


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """The inner maximisation of training: projected gradient descent (Madry et al., ICLR 2018)."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm that bounds the perturbation."""
    eps_255: float = 8.0
    """Radius of the ball in grey levels: 8 is 8/255 of the [0, 1] pixel range (paper, section 4.1)."""
    steps: int | None = None
    """Gradient steps; default: those of the paper of `loss.robust` (PGD-AT: 7, paper, section 4.1)."""
    step_size_255: float | None = None
    """Step size in grey levels; default: that of the paper of `loss.robust` (PGD-AT: min(1.25 eps, eps + 4)/steps)."""
    random_start: bool | None = None
    """Start at a random point, keyed by seed, epoch and image; default: as in the paper of `loss.robust`."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(0 <= self.eps_255 < math.inf, "attack.eps_255", self.eps_255, "must be at least 0 and finite")
        require(self.steps is None or self.steps >= 1, "attack.steps", self.steps, "must be at least 1")
        ok = self.step_size_255 is None or self.step_size_255 > 0
        require(ok, "attack.step_size_255", self.step_size_255, "must be positive")

    @property
    def eps(self) -> float:
        """Radius in pixel units of [0, 1]."""
        return self.eps_255 / 255


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """(1 - lambda) * clean loss + lambda * robust loss (paper, equation 2)."""

    robust: str = "pgd_at"
    """Robust term L_a, an objective of `oat_dist.losses`; docs/objectives.md has the list."""
    settings: dict[str, float] = field(default_factory=dict)
    """Settings of the objective, e.g. `loss.settings.beta` of TRADES; those left out are its paper's."""
    condition_on: str | None = None
    """A setting of the objective that lambda drives: the loss is L_a alone, with lambda times that setting."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes, in both terms."""
    clean_at_one: bool = True
    """Keep clean images with lambda = 1 in the training forward (paper), where their loss has weight 0 and they take
    part in the batch statistics alone. False leaves them out, which is cheaper and another computation."""
    distill_widths: bool = False
    """Narrower widths learn the answers of the whole network, on its own clean and adversarial images, in place of the
    objective (in-place distillation: Yu and Huang, ICCV 2019)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, schedule and averaging."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` has momentum; `adamw` is Adam with decoupled weight decay."""
    lr: float = 0.1
    """Peak learning rate (paper, section 4.1: 0.1)."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Nesterov momentum in sgd."""
    weight_decay: float = 5e-4
    """Weight decay on all parameters (paper, section 4.1: 5e-4)."""
    epochs: int = 200
    """Passes over the training split (paper, section 4.1: 200)."""
    batch_size: int = 128
    """Images per optimiser step, over all ranks and accumulation steps. An epoch leaves out its incomplete batch."""
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    """`cosine` falls to 0 over the run; `onecycle` rises linearly for `warmup_share`, then falls linearly to 0."""
    warmup_share: float = 0.0
    """Share of the run with linear warm-up, for every schedule; onecycle needs more than 0."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay per step of averaged weights, which are then the ones evaluated; 0 averages nothing."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(0 < self.lr < math.inf, "optim.lr", self.lr, "must be positive and finite")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "must lie in [0, 1)")
        expected = "Nesterov momentum needs optim.momentum > 0"
        require(not self.nesterov or self.momentum > 0, "optim.nesterov", self.nesterov, expected)
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must be at least 0")
        require(self.epochs >= 1, "optim.epochs", self.epochs, "must be at least 1")
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "must be at least 1")
        require(0 <= self.warmup_share < 1, "optim.warmup_share", self.warmup_share, "must lie in [0, 1)")
        ok = self.schedule != "onecycle" or self.warmup_share > 0
        require(ok, "optim.warmup_share", self.warmup_share, "must be more than 0 with optim.schedule=onecycle")
        require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "must be at least 0")
        require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is spread over memory and ranks."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs attack and training forward under bfloat16 autocast; parameters, FiLM, statistics, losses and the
    attack's iterates stay float32."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO: 1 shards optimiser state over ranks, 2 gradients too."""
    cuda_graph: bool = True
    """Run the attack as one recorded CUDA graph where it can be: on a GPU, with shapes that stay the same. Values are
    the same either way."""
    compile: bool = False
    """Run the network's forward through torch.compile, in training and attack; the first steps take minutes. Needs a
    C++ compiler on a CPU."""
    sync_statistics: bool = False
    """Share batch-norm statistics over ranks in every training forward."""
    threads: int = 0
    """CPU threads per rank; 0 divides the cores of the machine by the ranks on it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.accumulation >= 1, "engine.accumulation", self.accumulation, "must be at least 1")
        require(self.threads >= 0, "engine.threads", self.threads, "must be at least 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The measurement at the end of a run."""

    lambdas: tuple[float, ...] = PAPER_LAMBDAS
    """Lambdas at which SA and RA are measured."""
    split: Literal["train", "val", "test"] = "test"
    """Split that is measured."""
    steps: int = 20
    """PGD steps; norm and eps are those of the `attack` section."""
    restarts: int = 1
    """Random restarts; an image counts as robust when it withstands all."""
    interval_epochs: int = 0
    """Epochs between two measurements on the validation split; the network with the best frontier score is then the
    one reported. 0 validates never and reports the last."""
    batch_size: int = 512
    """Images per forward pass and rank."""
    noise_draws: int | None = None
    """Draws of the weight noise of conditioning.kind=float whose mean probabilities are the answer; default: 8."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ok = self.noise_draws is None or self.noise_draws >= 1
        require(ok, "evaluation.noise_draws", self.noise_draws, "must be at least 1")
        _check_lambdas("evaluation.lambdas", self.lambdas)
        require(self.steps >= 1, "evaluation.steps", self.steps, "must be at least 1")
        require(self.restarts >= 1, "evaluation.restarts", self.restarts, "must be at least 1")
        require(self.interval_epochs >= 0, "evaluation.interval_epochs", self.interval_epochs, "must be at least 0")
        require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "must be at least 1")

    @property
    def num_noise_draws(self) -> int:
        """`noise_draws` or its default, which is ours."""
        return self.noise_draws or 8


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported while a run goes on."""

    interval_steps: int = 50
    """Steps between two lines of metrics.jsonl; the only steps on which the host waits for the device."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.interval_steps >= 1, "logging.interval_steps", self.interval_steps, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What survives when a run is killed."""

    interval_epochs: int = 1
    """Epochs between two checkpoints; there is always one at the end of training."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    resume: str = "auto"
    """`auto`: the newest unfinished run of this name and settings goes on; `never`: a new run; or a run folder."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.interval_epochs >= 1, "checkpoint.interval_epochs", self.interval_epochs, "must be at least 1")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "must be at least 1")


def _check_lambdas(key: str, lambdas: tuple[float, ...]) -> None:
    require(len(lambdas) > 0, key, lambdas, "must name at least one lambda")
    require(all(0 <= lam <= 1 for lam in lambdas), key, lambdas, "every lambda must lie in [0, 1]")
    ok = all(a < b for a, b in pairwise(lambdas))
    require(ok, key, lambdas, "lambdas must increase, none twice")
