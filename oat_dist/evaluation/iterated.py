"""Our own gradient attacks, which drop an image as soon as it is broken.

An image is broken by the first iterate within ball and pixel range, the start among them, that is classified wrongly;
what is left is attacked on in ever smaller batches. All are projected gradient ascent (`oat_dist.attacks`) and differ
in what they make large:

    pgd      cross-entropy (Madry et al., ICLR 2018)
    cw       the margin max_j z_j - z_y (Carlini and Wagner, IEEE S&P 2017, section V.A, f_6 without its confidence)
    mim      cross-entropy, with gradients accumulated (Dong et al., CVPR 2018, Algorithm 1)
    pgd-t    z_t - z_y, for one wrong class t after the other (Gowal et al., arXiv:1910.09338, section 3)

Letters: N images, A of them still attacked, K classes, T targets.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from oat_dist.attacks import NORMS, random_start
from oat_dist.evaluation.ball import Ball
from oat_dist.evaluation.specs import MOMENTUM, EvaluationAttack
from oat_dist.evaluation.surface import Surface
from oat_dist.random import draw_keys

GRANULE = 16
"""Sizes that a batch may shrink to are multiples of this."""


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """[N] largest wrong logit minus that of the label: positive where the answer is wrong."""
    mine = logits.gather(1, label[:, None])
    others = logits.scatter(1, label[:, None], -torch.inf)
    return others.amax(1) - mine[:, 0]


def _cross_entropy(logits: Tensor, label: Tensor, target: Tensor | None) -> Tensor:
    return F.cross_entropy(logits, label, reduction="sum")


def _margin(logits: Tensor, label: Tensor, target: Tensor | None) -> Tensor:
    return margin(logits, label).sum()


def _towards(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return (logits.gather(1, target[:, None]) - logits.gather(1, label[:, None])).sum()


_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "pgd": _cross_entropy,
    "cw": _margin,
    "mim": _cross_entropy,
    "pgd-t": _towards,
}


def break_images(
    surface: Surface, x: Tensor, label: Tensor, index: Tensor, attack: EvaluationAttack, *, seed: int, ball: Ball
) -> Tensor:
    """Which images an attack breaks.

    Args:
        surface: What is attacked.
        x: [N, C, H, W] images in [0, 1].
        label: [N] int64 classes.
        index: [N] dataset indices on the device, for the keys of the random starts.
        attack: One of `ITERATED`.
        seed: Seed of the random starts.
        ball: Counts what left it; such points break nothing.

    Returns:
        [N] bool.
    """
    target_NT = _targets(surface, x, label, attack) if attack.kind == "pgd-t" else None
    run = _random_run if surface.is_random else _run
    broken = torch.zeros_like(label, dtype=torch.bool)
    for restart in range(attack.restarts):
        for rank in range(1 if target_NT is None else target_NT.shape[1]):
            left = (~broken).nonzero().flatten()
            if len(left) == 0:
                return broken
            start = x[left]
            # The momentum attack is published from the image itself.
            if attack.kind != "mim" or restart > 0:
                key = draw_keys(seed, "evaluation start", restart, index[left])
                start = random_start(start, key, eps=attack.eps, norm=attack.norm)
            target = None if target_NT is None else target_NT[left, rank]
            broken[left] = run(surface, x[left], start, label[left], target, attack, ball)
    return broken


def _targets(surface: Surface, x: Tensor, label: Tensor, attack: EvaluationAttack) -> Tensor:
    """[N, T] wrong classes, the most likely first."""
    with torch.no_grad():
        logits = surface.gradient(x).scatter(1, label[:, None], -torch.inf)
    order = logits.argsort(1, descending=True)[:, :-1]
    return order[:, : attack.targets]


def _gradient(
    surface: Surface, x_adv: Tensor, label: Tensor, target: Tensor | None, attack: EvaluationAttack
) -> tuple[Tensor, Tensor]:
    """Gradient of what the attack makes large, and the logits."""
    with torch.enable_grad():
        x_adv = x_adv.detach().requires_grad_(True)
        logits = surface.gradient(x_adv)
        (grad,) = torch.autograd.grad(_LOSSES[attack.kind](logits, label, target), x_adv)
    return grad, logits.detach()


def _step(x: Tensor, x_adv: Tensor, direction: Tensor, attack: EvaluationAttack) -> Tensor:
    geometry = NORMS[attack.norm]
    x_adv = x_adv + attack.length * geometry.ascent(direction)
    return (x + geometry.project(x_adv - x, attack.eps)).clamp(0, 1)


def _accumulated(momentum: Tensor, grad: Tensor, attack: EvaluationAttack) -> Tensor:
    """Direction of the next step, before the geometry."""
    if attack.kind != "mim":
        return grad
    # The published norm is the sum, which is the mean times a constant that no geometry sees.
    scale = grad.abs().flatten(1).mean(1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return MOMENTUM * momentum + grad / scale


def _run(
    surface: Surface, x: Tensor, x_adv: Tensor, label: Tensor, target: Tensor | None, attack: EvaluationAttack,
    ball: Ball,
) -> Tensor:  # fmt: skip
    """[N] bool: which images one start breaks."""
    broken = torch.zeros_like(label, dtype=torch.bool)
    at = torch.arange(len(x), device=x.device)
    momentum = torch.zeros(1, device=x.device)
    for step in range(attack.steps + 1):
        is_last = step == attack.steps
        grad, logits = (None, None) if is_last else _gradient(surface, x_adv, label, target, attack)
        broken[at] |= ball.keep_inside(_is_wrong(surface, x_adv, label, logits), x, x_adv)
        kept = _kept(broken[at])
        if is_last or len(kept) == 0:
            break
        if len(kept) < len(at):
            at, x, x_adv, label, grad = (each[kept] for each in (at, x, x_adv, label, grad))
            momentum = momentum[kept] if momentum.dim() > 1 else momentum
            target = None if target is None else target[kept]
        momentum = _accumulated(momentum, grad, attack)
        x_adv = _step(x, x_adv, momentum, attack)
    return broken


def _kept(broken: Tensor) -> Tensor:
    """Places of the images that go on: those not broken, and as many others as make a multiple of `GRANULE`.

    A new batch size costs a new plan of every convolution; multiples of a granule are few sizes.
    """
    left = (~broken).nonzero().flatten()
    if len(left) == 0:
        return left
    size = min(len(broken), -(-len(left) // GRANULE) * GRANULE)
    return torch.cat((left, broken.nonzero().flatten()[: size - len(left)]))


@torch.no_grad()
def _is_wrong(surface: Surface, x_adv: Tensor, label: Tensor, logits: Tensor | None) -> Tensor:
    """[A] bool: where the answer that counts is wrong; `logits` are those of the gradient, None at the last iterate."""
    if logits is None or surface.screen == "none":
        return surface.decide(x_adv).argmax(1) != label
    wrong = logits.argmax(1) != label
    if surface.screen == "rough":
        suspects = wrong.nonzero().flatten()
        if len(suspects):
            wrong[suspects] = surface.decide(x_adv[suspects]).argmax(1) != label[suspects]
    return wrong


def _random_run(
    surface: Surface, x: Tensor, x_adv: Tensor, label: Tensor, target: Tensor | None, attack: EvaluationAttack,
    ball: Ball,
) -> Tensor:  # fmt: skip
    """[N] bool, against a network that answers at random: the iterate whose mean logits are worst is asked once.

    To ask at every iterate would count luck: an image that is wrong one time in twenty is nearly always wrong once.
    """
    momentum = torch.zeros(1, device=x.device)
    worst, x_worst = x.new_full((len(x),), -torch.inf), x_adv
    for step in range(attack.steps + 1):
        grad, logits = _gradient(surface, x_adv, label, target, attack)
        now = margin(logits, label)
        is_worse = now > worst
        worst = torch.where(is_worse, now, worst)
        x_worst = torch.where(is_worse.view(-1, 1, 1, 1), x_adv, x_worst)
        if step < attack.steps:
            momentum = _accumulated(momentum, grad, attack)
            x_adv = _step(x, x_adv, momentum, attack)
    with torch.no_grad():
        return ball.keep_inside(surface.decide(x_worst).argmax(1) != label, x, x_worst)
