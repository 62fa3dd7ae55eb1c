"""The four attacks of AutoAttack's standard version, run by its authors' package. The only file that imports it.

apgd-ce and apgd-t (Croce and Hein, ICML 2020), fab-t (Croce and Hein, "Minimally Distorted Adversarial Examples with a
Fast Adaptive Boundary Attack", ICML 2020), square (Andriushchenko et al., "Square Attack", ECCV 2020); for L1 in the
form of Croce and Hein, "Mind the Box" (ICML 2021). What one call of the package does depends on all images of its
batch, so the same images must be asked about together to get the same answer.
"""

import importlib.util
import logging
from typing import Protocol

import torch
from torch import Tensor

from oat_dist.errors import UserError
from oat_dist.evaluation.ball import Ball
from oat_dist.evaluation.specs import EvaluationAttack
from oat_dist.evaluation.surface import Surface

DLR_CLASSES = 4
"""The targeted difference-of-logits-ratio loss of apgd-t divides by the third and fourth largest logit."""
_TARGETS = {"linf": 9, "l2": 9, "l1": 5}
"""Wrong classes that apgd-t aims at in the standard version; fab-t has 9 in every norm."""
_FAB_TARGETS = 9
_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}

# The package warns of every point with a zero gradient; `checks.py` says so once.
_LOGGER = logging.getLogger("oat_dist.autoattack")
_LOGGER.addHandler(logging.NullHandler())
_LOGGER.propagate = False


class _Attack(Protocol):
    """What is used of the package's classes."""

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """[N, C, H, W] adversarial images."""


def is_installed() -> bool:
    """Whether the package is there (it is not imported)."""
    return importlib.util.find_spec("pyautoattack") is not None


def break_images(
    surface: Surface, x: Tensor, label: Tensor, attack: EvaluationAttack, *, seed: int, ball: Ball
) -> Tensor:
    """Which images an attack breaks.

    Args:
        surface: What is attacked.
        x: [N, C, H, W] images in [0, 1].
        label: [N] int64 classes.
        attack: One of `EXTERNAL`.
        seed: Seed of all draws; torch's own generator is left as it was.
        ball: Counts what left it; such points break nothing.

    Returns:
        [N] bool: the point that the attack found lies in the ball and is answered wrongly.

    Raises:
        UserError: The package is not installed.
    """
    if not is_installed():
        raise UserError(f"attack {attack.name}: needs the package pyautoattack, which is not installed")
    if attack.eps == 0:  # the ball of radius 0 holds the image alone
        return torch.zeros_like(label, dtype=torch.bool)
    # Channels last in memory as they come, which the package's views cannot take.
    x = x.contiguous()
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.no_grad():
        num_classes = surface.decide(x[:1]).shape[1]
        x_adv = _attack(surface, attack, num_classes, seed, x.device).perturb(x, label)
        return ball.keep_inside(surface.decide(x_adv).argmax(1) != label, x, x_adv)


def _attack(surface: Surface, attack: EvaluationAttack, num_classes: int, seed: int, device: torch.device) -> _Attack:
    """An attack of the package, with the settings of its standard version."""
    # Only here: training and the attacks of our own need no such package.
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    class FewClasses(APGDAttack_targeted):
        """apgd-t on the difference of two logits, not divided, which is defined for any number of classes."""

        def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.gather(1, self.y_target[:, None]) - x.gather(1, y[:, None]))[:, 0]

    common = {"norm": _NORM[attack.norm], "eps": attack.eps, "seed": seed, "device": device,
              "n_restarts": attack.restarts, "verbose": False}  # fmt: skip
    wrong = num_classes - 1
    if attack.kind == "fab-t":
        count = min(_FAB_TARGETS, wrong)
        return FABAttack_PT(surface.gradient, n_iter=attack.steps, targeted=True, n_target_classes=count, **common)
    if attack.kind == "square":
        return SquareAttack(surface.gradient, p_init=0.8, n_queries=attack.steps, resc_schedule=False, **common)
    common |= {"n_iter": attack.steps, "eot_iter": 1, "rho": 0.75, "use_largereps": attack.norm == "l1",
               "logger": _LOGGER}  # fmt: skip
    if attack.kind == "apgd-ce":
        return APGDAttack(surface.gradient, loss="ce", **common)
    targeted = APGDAttack_targeted if num_classes >= DLR_CLASSES else FewClasses
    return targeted(surface.gradient, n_target_classes=min(_TARGETS[attack.norm], wrong), **common)
