"""Gradient attacks on a function from images to logits.

Projected gradient ascent on the loss within a ball around the image and within [0, 1] (Madry et al., "Towards Deep
Learning Models Resistant to Adversarial Attacks", ICLR 2018, section 2.1). An attack knows neither network nor lambda:
who calls it closes over them. What depends on the norm is in `NORMS`, apart from the loop.

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

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits_NK, label_N) -> scalar that the attack makes large; a sum over images, so that they do not interact."""


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


def cross_entropy_sum(logits_NK: Tensor, label_N: Tensor) -> Tensor:
    """Sum over images of the cross-entropy, computed in float32 at least."""
    if logits_NK.dtype in (torch.bfloat16, torch.float16):
        logits_NK = logits_NK.float()
    return F.cross_entropy(logits_NK, label_N, reduction="sum")


def pgd(
    logits_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    label: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float | None = None,
    norm: str = "linf",
    start_key: Tensor | None = None,
    objective: Objective = cross_entropy_sum,
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
        objective: What is made large; default: cross-entropy.

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
    return ascend(
        logits_fn, x, start, label, eps=eps, steps=steps, step_size=step_size, norm=norm, objective=objective
    )  # fmt: skip


def random_start(x: Tensor, key: Tensor, *, eps: float, norm: str) -> Tensor:
    """[N, C, H, W] uniform random points of the ball around images, within [0, 1], from [N] keys."""
    return (x + eps * NORMS[norm].start(key, tuple(x.shape[1:])).to(x.dtype)).clamp(0, 1)


def ascend(
    logits_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    label: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    norm: str,
    objective: Objective = cross_entropy_sum,
) -> Tensor:
    """The loop of `pgd`, from the first iterate to the last: a function of its tensors that waits for nothing.

    Args:
        logits_fn: As in `pgd`.
        x: [N, C, H, W] images in [0, 1], the centres of the balls.
        start: [N, C, H, W] first iterate.
        label: [N] int64 classes.
        eps: Radius of the ball.
        steps: Gradient steps.
        step_size: Length of a step.
        norm: One of `NORMS`.
        objective: What is made large.

    Returns:
        [N, C, H, W] last iterate, detached.
    """
    geometry, x_adv = NORMS[norm], start
    for _ in range(steps):
        with torch.enable_grad():
            x_adv = x_adv.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(objective(logits_fn(x_adv), label), x_adv)
        moved = x_adv.detach() + step_size * geometry.ascent(grad)
        x_adv = (x + geometry.project(moved - x, eps)).clamp(0, 1)
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
