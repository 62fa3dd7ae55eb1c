"""What a robust term L_a is: its loss on examples, its paper's attack, its own settings, and what it needs.

A method is one file of this package that makes an `Objective` and hands it to `register`. The step gives the loss an
`Examples` with exactly what the objective declares.

Letters: A attacked images, C, H, W, K classes, F features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from oat_dist.attacks import Maximise, cross_entropy


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The attacked images of a micro-batch after the one training forward; what was not asked for is None."""

    label_A: Tensor
    """int64 classes."""
    adversarial_logits_AK: Tensor
    """Logits of the adversarial images."""
    settings: Mapping[str, float | Tensor]
    """The objective's settings; one that lambda drives is an [A] tensor."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, where the method has a cross-entropy on labels."""
    clean_logits_AK: Tensor | None = None
    """Logits of the clean images."""
    clean_features_AF: Tensor | None = None
    """Penultimate features of the clean images."""
    adversarial_features_AF: Tensor | None = None
    """Penultimate features of the adversarial images."""
    noisy_features_AF: Tensor | None = None
    """Penultimate features of the noisy images."""
    clean_image_ACHW: Tensor | None = None
    """Clean images."""
    adversarial_image_ACHW: Tensor | None = None
    """Adversarial images."""
    noisy_image_ACHW: Tensor | None = None
    """Uniform random points of the balls."""
    noisy_logits_AK: Tensor | None = None
    """Logits of those."""
    clean_gradient_ACHW: Tensor | None = None
    """Gradient of the summed cross-entropies of clean and noisy images to the clean ones, with a graph."""
    adversarial_gradient_ACHW: Tensor | None = None
    """The same to the adversarial images: 0, or what these do to others through shared batch statistics."""
    noisy_gradient_ACHW: Tensor | None = None
    """The same to the noisy images."""

    def cross_entropy(self, logits_AK: Tensor) -> Tensor:
        """[A] cross-entropies with the labels, smoothed as configured."""
        return F.cross_entropy(logits_AK, self.label_A, reduction="none", label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class AttackDefaults:
    """The inner maximisation as the paper of a method has it; the `attack` section can set steps, step size, start."""

    steps: int = 7
    """Gradient steps; 0 leaves the start as it is."""
    step_share: float | None = None
    """Step size as a share of eps; None: min(1.25 eps, eps + 4/255) / steps."""
    start: Literal["uniform", "gaussian", "none"] = "uniform"
    """Random start: uniform in a ball around the image, Gaussian noise on it, or the image itself."""
    start_size: float = 1.0
    """Radius of the uniform start as a share of eps; standard deviation of the Gaussian one in pixel units."""
    project: bool = True
    """Whether every iterate is brought back into the ball."""
    maximise: Maximise = cross_entropy
    """What the attack makes large."""
    preparation: tuple[int, int] = (0, 0)
    """Forward and backward passes per image of `maximise` before the first step."""
    single_step: bool = False
    """Whether another number of steps would be another method."""


Need = Literal["clean_logits", "features", "input_gradient", "noisy_logits", "extra_data"]
Statistics = Literal["own", "clean"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One robust term: the complete published loss of a method."""

    name: str
    """Value of `loss.robust`."""
    source: str
    """Paper and equation."""
    loss: Callable[[Examples], Tensor]
    """Examples to [A] losses."""
    attack: AttackDefaults = field(default_factory=AttackDefaults)
    """The paper's attack."""
    settings: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Settings of the method, `loss.settings.NAME`, and their defaults; all are at least 0."""
    at_most_one: tuple[str, ...] = ()
    """Settings that may not be more than 1."""
    conditionable: tuple[str, ...] = ()
    """Settings that lambda may drive (`loss.condition_on`): at 0 the objective is the clean cross-entropy."""
    needs: frozenset[Need] = frozenset()
    """`clean_logits`, `features`; `noisy_logits`: a third forward, of a random point of the ball; `input_gradient`: of
    the cross-entropy, to the clean image and the noisy one if there is, with a graph; `extra_data`."""
    adversarial_statistics: Statistics = "own"
    """Batch statistics of the adversarial images in the training forward: `own`, as in a call of their own, or `clean`,
    common ones with the clean images, for a loss that compares values of one and the same function of the image."""

    def __post_init__(self) -> None:
        """Check that the declaration is sound."""
        for name in ("conditionable", "at_most_one"):
            unknown = set(getattr(self, name)) - set(self.settings)
            if unknown:
                raise ValueError(f"{name}={getattr(self, name)}: {sorted(unknown)[0]} is no setting of {self.name}")

    @property
    def view_statistics(self) -> tuple[Statistics, ...]:
        """Batch statistics of the images besides the clean one that each attacked image has in the training forward."""
        return (self.adversarial_statistics, *(("own",) if "noisy_logits" in self.needs else ()))

    @property
    def views(self) -> int:
        """Number of those images."""
        return len(self.view_statistics)

    @property
    def has_input_gradient(self) -> bool:
        """Whether gradients to images are part of the loss: one more backward pass, to be differentiated itself."""
        return "input_gradient" in self.needs


ROBUST: dict[str, Objective] = {}
"""Registered objectives by name."""


def register(objective: Objective) -> Objective:
    """Make an objective a value of `loss.robust`.

    Raises:
        ValueError: Another objective has its name.
    """
    if ROBUST.setdefault(objective.name, objective) is not objective:
        raise ValueError(f"name={objective.name!r}: there is an objective of this name; choose another")
    return objective


def unregister(objective: Objective) -> None:
    """Take an objective that was registered off the list."""
    del ROBUST[objective.name]


def kl_divergence(target_logits_AK: Tensor, logits_AK: Tensor) -> Tensor:
    """[A] Kullback-Leibler divergences KL(softmax(target) || softmax(logits)); gradients flow to both."""
    log_p, log_q = F.log_softmax(target_logits_AK, 1), F.log_softmax(logits_AK, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def direction(v_AF: Tensor) -> Tensor:
    """[A, F] vectors of length 1; one of length 0 stays 0 and gets no gradient."""
    square_A1 = v_AF.square().sum(1, keepdim=True)
    is_zero_A1 = square_A1 == 0
    return v_AF * torch.where(is_zero_A1, 0, torch.where(is_zero_A1, 1, square_A1).rsqrt())
