"""Gradient attacks on a function from images to logits.

Projected gradient ascent on the loss within a ball around the image and within [0, 1] (Madry et al., "Towards Deep
Learning Models Resistant to Adversarial Attacks", ICLR 2018, section 2.1). An attack knows neither network nor lambda:
who calls it closes over them. What depends on the norm is in `NORMS`, apart from the loop, and what is made large is
a `Maximise`.

Letters: N images, C channels, H, W, D = C*H*W, K classes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oat_dist.config import default_step_size
from oat_dist.random import draw_keys, normal, uniform

LogitsFn = Callable[[Tensor], Tensor]
"""[N, C, H, W] images to [N, K] logits, differentiable."""
Maximise = Callable[[LogitsFn, Tensor, Tensor], Callable[[Tensor, Tensor], Tensor]]
"""(logits_fn, x, label) -> ((x_adv, logits of x_adv) -> scalar): what an attack makes large. Prepared once per attack,
where it may look at the clean images; the scalar is a sum over images, so that they do not interact."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Geometry of a norm ball; every function keeps [N, C, H, W]."""

    ascent: Callable[[Tensor], Tensor]
    """Direction of norm 1 in which the loss rises fastest, from the gradient."""
    project: Callable[[Tensor, float], Tensor]
    """Nearest perturbation within a radius."""
    start: Callable[[Tensor, tuple[int, ...]], Tensor]
    """Uniform random point of the unit ball, from [N] keys and the shape of one image."""


def _length(v: Tensor) -> Tensor:
    """[N, 1, 1, 1] Euclidean lengths, never 0."""
    return v.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


def _l2_start(key_N: Tensor, shape: tuple[int, ...]) -> Tensor:
    direction = normal(key_N, shape)
    radius_N = uniform(draw_keys(0, "radius", key_N)) ** (1 / direction[0].numel())
    return direction / _length(direction) * radius_N.view(-1, 1, 1, 1)


NORMS = {
    "linf": Norm(
        ascent=torch.sign,
        project=lambda delta, eps: delta.clamp(-eps, eps),
        start=lambda key_N, shape: 2 * uniform(key_N, shape) - 1,
    ),
    "l2": Norm(
        ascent=lambda grad: grad / _length(grad),
        project=lambda delta, eps: delta * (eps / _length(delta)).clamp(max=1),
        start=_l2_start,
    ),
}


def cross_entropy(logits_fn: LogitsFn, x: Tensor, label: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The cross-entropy with the labels, computed in float32 at least."""
    return lambda x_adv, logits_NK: F.cross_entropy(at_least_float32(logits_NK), label, reduction="sum")


def at_least_float32(t: Tensor) -> Tensor:
    """A tensor in float32, or float64 if it is that."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class AttackPlan:
    """Projected gradient ascent, complete; lengths in pixel units of [0, 1]."""

    norm: str
    """One of `NORMS`."""
    eps: float
    """Radius of the ball."""
    steps: int
    """Gradient steps; 0 leaves the start as it is."""
    step_size: float
    """Length of a step in `norm`."""
    start: str = "uniform"
    """`uniform`: a random point of the ball of radius `start_size`; `gaussian`: noise of that deviation; `none`."""
    start_size: float = 0.0
    """Radius or standard deviation of the start."""
    project: bool = True
    """Bring every iterate back into the ball."""
    maximise: Maximise = cross_entropy
    """What is made large."""

    def first_iterate(self, x: Tensor, key: Tensor) -> Tensor:
        """[N, C, H, W] starts for images, within [0, 1], from [N] keys (`oat_dist.random`)."""
        if self.start == "none":
            return x
        if self.start == "gaussian":
            return (x + self.start_size * normal(key, tuple(x.shape[1:])).to(x.dtype)).clamp(0, 1)
        return random_start(x, key, eps=self.start_size, norm=self.norm)


def pgd(
    logits_fn: LogitsFn,
    x: Tensor,
    label: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float | None = None,
    norm: str = "linf",
    start_key: Tensor | None = None,
    maximise: Maximise = cross_entropy,
) -> Tensor:
    """Projected gradient ascent.

    Args:
        logits_fn: [N, C, H, W] images to [N, K] logits, differentiable.
        x: [N, C, H, W] images in [0, 1].
        label: [N] int64 classes.
        eps: Radius of the ball, pixel units of [0, 1].
        steps: Gradient steps, at least 1.
        step_size: Length of a step in `norm`; default min(1.25 eps, eps + 4/255) / steps.
        norm: "linf" or "l2".
        start_key: [N] keys (`oat_dist.random`) of a random start in the ball; None starts at `x`.
        maximise: What is made large; default: cross-entropy.

    Returns:
        [N, C, H, W] adversarial images within [0, 1] and the ball, detached: the last iterate.

    Raises:
        ValueError: `norm` is unknown, or `eps` or `steps` out of range.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: expected one of {', '.join(NORMS)}")
    if not eps >= 0 or steps < 1:
        raise ValueError(f"eps={eps}, steps={steps}: expected eps >= 0 and steps >= 1")
    step_size = default_step_size(eps, steps) if step_size is None else step_size
    x = x.detach()
    if len(x) == 0:
        return x
    start = x if start_key is None else random_start(x, start_key, eps=eps, norm=norm)
    plan = AttackPlan(norm=norm, eps=eps, steps=steps, step_size=step_size, maximise=maximise)
    return ascend(logits_fn, x, start, label, plan)


def random_start(x: Tensor, key: Tensor, *, eps: float, norm: str) -> Tensor:
    """[N, C, H, W] uniform random points of the ball around images, within [0, 1], from [N] keys."""
    return (x + eps * NORMS[norm].start(key, tuple(x.shape[1:])).to(x.dtype)).clamp(0, 1)


def ascend(logits_fn: LogitsFn, x: Tensor, start: Tensor, label: Tensor, plan: AttackPlan) -> Tensor:
    """The loop of an attack, from the first iterate to the last: a function of its tensors that waits for nothing.

    Args:
        logits_fn: As in `pgd`.
        x: [N, C, H, W] images in [0, 1], the centres of the balls.
        start: [N, C, H, W] first iterate.
        label: [N] int64 classes.
        plan: All else; its start is not used.

    Returns:
        [N, C, H, W] last iterate, detached.
    """
    geometry, x_adv = NORMS[plan.norm], start
    made_large = plan.maximise(logits_fn, x, label) if plan.steps else None
    for _ in range(plan.steps):
        with torch.enable_grad():
            x_adv = x_adv.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(made_large(x_adv, logits_fn(x_adv)), x_adv)
        x_adv = x_adv.detach() + plan.step_size * geometry.ascent(grad)
        if plan.project:
            x_adv = x + geometry.project(x_adv - x, plan.eps)
        x_adv = x_adv.clamp(0, 1)
    return x_adv.detach()


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode and, however the block ends, every module back into the mode it had."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
