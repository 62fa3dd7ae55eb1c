"""Local linearity regularisation: the clean loss, how far it is from linear in the ball, and its slope there.

Qin et al., "Adversarial Robustness through Local Linearization" (NeurIPS 2019). With l the cross-entropy,

    l(x) + weight (linearity g(d) + gradient |d' grad l(x)|),    g(d) = |l(x + d) - l(x) - d' grad l(x)|

where d makes g large in the ball. linearity and gradient are their lambda and mu; 4 and 3 are what re-implementations
give as theirs for CIFAR-10, not checked against the paper. weight is ours, 1, so that one number leads to the clean
cross-entropy. d is found by ten steps from a uniform start, as on CIFAR-10;
sign steps of 1.25 eps / 10 (PGD-AT's rule) are our default.

l must be one function of x, so clean and perturbed images share their batch statistics. As the gradient is that of the
sum of losses, it has what x does to other images through those. Letters as in `objective.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from oat_dist.attacks import at_least_float32
from oat_dist.losses.objective import AttackDefaults, Examples, Objective, register


def llr_loss(examples: Examples) -> Tensor:
    """[A] CE(clean) + weight (linearity g + gradient |slope|)."""
    clean_A = examples.cross_entropy(examples.clean_logits_AK)
    slope_A = _along(examples.adversarial_image_ACHW - examples.clean_image_ACHW, examples.clean_gradient_ACHW)
    distance_A = (examples.cross_entropy(examples.adversarial_logits_AK) - clean_A - slope_A).abs()
    settings = examples.settings
    penalty_A = settings["linearity"] * distance_A + settings["gradient"] * slope_A.abs()
    return clean_A + settings["weight"] * penalty_A


def distance_from_linear(
    logits_fn: Callable[[Tensor], Tensor], x: Tensor, label: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """g, summed over images, as what an attack makes large: one forward and one backward of the clean images."""
    with torch.enable_grad():
        centre = x.detach().requires_grad_(True)
        centre_A = F.cross_entropy(at_least_float32(logits_fn(centre)), label, reduction="none")
        (grad_ACHW,) = torch.autograd.grad(centre_A.sum(), centre)
    centre_A = centre_A.detach()

    def total(x_adv: Tensor, logits: Tensor) -> Tensor:
        loss_A = F.cross_entropy(at_least_float32(logits), label, reduction="none")
        return (loss_A - centre_A - _along(x_adv - x, grad_ACHW)).abs().sum()

    return total


def _along(delta_ACHW: Tensor, grad_ACHW: Tensor) -> Tensor:
    """[A] products of perturbations and gradients."""
    return (delta_ACHW * grad_ACHW).flatten(1).sum(1)


LLR = register(
    Objective(
        name="llr",
        source="Qin et al., NeurIPS 2019",
        loss=llr_loss,
        attack=AttackDefaults(steps=10, maximise=distance_from_linear, preparation=(1, 1)),
        settings={"linearity": 4.0, "gradient": 3.0, "weight": 1.0},
        conditionable=("weight",),
        needs=frozenset({"clean_logits", "input_gradient"}),
        adversarial_statistics="clean",
    )
)
