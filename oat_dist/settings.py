"""The sections of a configuration: names, units, defaults and ranges of every setting, as frozen dataclasses.

Standard library only. The sections `model` and `conditioning` are in `network_settings.py`; `config.py` puts all
together. "Paper" is Wang et al., "Once-for-All Adversarial Training", NeurIPS 2020 (OAT).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from oat_dist.errors import require
from oat_dist.network_settings import PAPER_LAMBDAS, check_lambdas


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
    cutout_pixels: int = 0
    """Side of the square that is blanked out at a random place of every training image; 0 blanks nothing."""
    extra: str | None = None
    """A further prepared data set that every batch has a share of, e.g. with pseudo-labels (launch/pseudo_label.py)."""
    extra_share: float = 0.5
    """Share of every batch that comes from `data.extra`, rounded up to images; an epoch remains a pass over
    `data.dataset` (robust self-training: half)."""
    extra_weight: float = 1.0
    """Weight of the losses of those images (robust self-training: 1)."""
    normalise: bool = False
    """Subtract the training split's mean and divide by its deviation, per channel, inside the network (paper: no)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.workers >= 1, "data.workers", self.workers, "must be at least 1")
        ok = self.shift_pixels is None or self.shift_pixels >= 0
        require(ok, "data.shift_pixels", self.shift_pixels, "must be at least 0")
        require(self.cutout_pixels >= 0, "data.cutout_pixels", self.cutout_pixels, "must be at least 0")
        require(0 < self.extra_share < 1, "data.extra_share", self.extra_share, "must lie in (0, 1)")
        ok = 0 <= self.extra_weight < math.inf
        require(ok, "data.extra_weight", self.extra_weight, "must be at least 0 and finite")


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
    early_steps: int | None = None
    """Gradient steps in the first epochs, fewer than later, each of min(1.25 eps, eps + 4)/early_steps; default: as
    many as later."""
    early_share: float = 0.0
    """Share of the epochs, from the beginning, that have `early_steps`; rounded down to whole epochs."""
    random_start: bool | None = None
    """Start at a random point, keyed by seed, epoch and image; default: as in the paper of `loss.robust`."""
    guard: Literal["auto", "switch", "stop", "none"] = "auto"
    """What to do when robust accuracy collapses in training (catastrophic overfitting): `switch` goes back to the last
    good checkpoint and on with PGD, `stop` reports that one; `auto`: switch for single-step methods, else none."""
    guard_images: int = 256
    """Validation images, spread over the split, on which the guard measures PGD-10 after every epoch."""
    guard_drop: float = 0.5
    """Share of the best robust accuracy so far, in (0, 1), whose loss is a collapse."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(0 <= self.eps_255 < math.inf, "attack.eps_255", self.eps_255, "must be at least 0 and finite")
        require(self.steps is None or self.steps >= 1, "attack.steps", self.steps, "must be at least 1")
        ok = self.step_size_255 is None or self.step_size_255 > 0
        require(ok, "attack.step_size_255", self.step_size_255, "must be positive")
        ok = self.early_steps is None or self.early_steps >= 1
        require(ok, "attack.early_steps", self.early_steps, "must be at least 1")
        require(0 <= self.early_share < 1, "attack.early_share", self.early_share, "must lie in [0, 1)")
        if self.early_steps is None:
            require(self.early_share == 0, "attack.early_share", self.early_share, "needs attack.early_steps")
        else:
            expected = f"must be more than 0 with attack.early_steps={self.early_steps}"
            require(self.early_share > 0, "attack.early_share", self.early_share, expected)
        require(self.guard_images >= 1, "attack.guard_images", self.guard_images, "must be at least 1")
        require(0 < self.guard_drop < 1, "attack.guard_drop", self.guard_drop, "must lie in (0, 1)")

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
    self_distillation: float = 0.0
    """Share of the target of images with lambda > 0, in both terms, that is what the same network answers to the clean
    image at lambda = 0, in [0, 1); the rest is the label. With loss.robust=pgd_at alone."""
    clean_at_one: bool = True
    """Keep clean images with lambda = 1 in the training forward (paper), where their loss has weight 0 and they take
    part in the batch statistics alone. False leaves them out, which is cheaper and another computation."""
    distill_widths: bool = False
    """Narrower widths learn the answers of the whole network, on its own clean and adversarial images, in place of the
    objective (in-place distillation: Yu and Huang, ICCV 2019)."""
    width_weights: tuple[float, ...] | None = None
    """What the loss of every one of model.widths counts in the sum of a step; None is 1 of each, as in the published
    code of slimmable networks. The less narrow widths count, the closer the whole network is to one trained alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        weights = self.width_weights
        ok = weights is None or all(0 < weight < math.inf for weight in weights)
        require(ok, "loss.width_weights", weights, "must be positive")
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "must lie in [0, 1)")
        key = "loss.self_distillation"
        require(0 <= self.self_distillation < 1, key, self.self_distillation, "must lie in [0, 1)")
        expected = f"must be 0 with loss.robust={self.robust}; only pgd_at has a target to share"
        require(self.self_distillation == 0 or self.robust == "pgd_at", key, self.self_distillation, expected)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, schedule and averaging."""

    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """`sgd` has momentum; `adamw` is Adam with decoupled weight decay; `muon` makes the steps of convolutions
    orthogonal (`oat_dist.muon`) and is sgd for all else."""
    lr: float = 0.1
    """Peak learning rate (paper, section 4.1: 0.1)."""
    lr_batch_size: int | None = None
    """Batch size for which `lr` is meant: at another the rate is lr * batch_size / lr_batch_size, reached by a
    warm-up (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.1); default: the rate is `lr`."""
    film_lr: float = 1.0
    """Learning rate of what makes FiLM's scales and shifts, as a multiple of that of all else. A lambda moves its own
    by its share of the images alone."""
    muon_lr: float = 0.05
    """Peak learning rate of the convolutions under muon; schedule and scaling with the batch are those of `lr`."""
    momentum: float = 0.9
    """Momentum of sgd and muon."""
    nesterov: bool = True
    """Nesterov momentum in sgd."""
    weight_decay: float = 5e-4
    """Weight decay (paper, section 4.1: 5e-4)."""
    decay: Literal["all", "weights"] = "all"
    """What decays: `all` parameters (paper), or the `weights` of convolutions and classifier alone, so that norms,
    biases and FiLM do not."""
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
    awp_gamma: float = 0.0
    """Adversarial weight perturbation (Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization",
    NeurIPS 2020): length of a layer's perturbation, as a share of the norm of its weights; the paper takes 5e-3 to
    1e-2. Every step then takes one more forward and backward. 0 perturbs nothing."""
    awp_warmup_share: float = 0.0
    """Share of the run before the perturbation begins."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(0 < self.lr < math.inf, "optim.lr", self.lr, "must be positive and finite")
        ok = self.lr_batch_size is None or self.lr_batch_size >= 1
        require(ok, "optim.lr_batch_size", self.lr_batch_size, "must be at least 1")
        require(0 < self.film_lr < math.inf, "optim.film_lr", self.film_lr, "must be positive and finite")
        require(0 < self.muon_lr < math.inf, "optim.muon_lr", self.muon_lr, "must be positive and finite")
        expected = "needs optim.optimizer=muon; nothing else goes by it"
        ok = self.optimizer == "muon" or self.muon_lr == OptimConfig.muon_lr
        require(ok, "optim.muon_lr", self.muon_lr, expected)
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
        require(0 <= self.awp_gamma < 1, "optim.awp_gamma", self.awp_gamma, "must lie in [0, 1)")
        ok = 0 <= self.awp_warmup_share < 1
        require(ok, "optim.awp_warmup_share", self.awp_warmup_share, "must lie in [0, 1)")
        expected = "needs optim.awp_gamma > 0; nothing else waits for it"
        ok = self.awp_gamma > 0 or not self.awp_warmup_share
        require(ok, "optim.awp_warmup_share", self.awp_warmup_share, expected)

    @property
    def peak_lr(self) -> float:
        """Largest learning rate of the schedule."""
        return self.lr if self.lr_batch_size is None else self.lr * self.batch_size / self.lr_batch_size


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
        check_lambdas("evaluation.lambdas", self.lambdas)
        require(self.steps >= 1, "evaluation.steps", self.steps, "must be at least 1")
        require(self.restarts >= 1, "evaluation.restarts", self.restarts, "must be at least 1")
        require(self.interval_epochs >= 0, "evaluation.interval_epochs", self.interval_epochs, "must be at least 0")
        require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "must be at least 1")

    @property
    def num_noise_draws(self) -> int:
        """`noise_draws` or its default, which is ours."""
        return self.noise_draws or 8
