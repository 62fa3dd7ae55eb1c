"""FGSM with gradient alignment: the input gradient points the same way all over the ball.

Andriushchenko and Flammarion, "Understanding and Improving Fast Adversarial Training" (NeurIPS 2020). With l the
cross-entropy and e uniform in the ball,

    l(x') + weight (1 - cos(grad l(x), grad l(x + e))),    x' = x + eps sign(grad l(x)), without a random start

and weight 0.2, theirs on CIFAR-10 at eps = 8/255. Gradients flow through both inputs of the cosine, as the equation has
it; their code stops them at the first. It also steps by 1.25 eps, which from x, within the linf ball, is the same.
x + e stays in [0, 1] here. The cosine is left out where a gradient is 0, as in their code. Letters as in
`objective.py`.
"""

import torch
from torch import Tensor

from oat_dist.losses.objective import AttackDefaults, Examples, Objective, direction, register


def grad_align_loss(examples: Examples) -> Tensor:
    """[A] CE(adversarial) + weight (1 - cosine of the gradients at the clean and the noisy image)."""
    gradients = (examples.clean_gradient_ACHW, examples.noisy_gradient_ACHW)
    at_clean_AF, at_noisy_AF = (direction(gradient.flatten(1)) for gradient in gradients)
    is_zero_A = (at_clean_AF == 0).all(1) | (at_noisy_AF == 0).all(1)
    misalignment_A = torch.where(is_zero_A, 0, 1 - (at_clean_AF * at_noisy_AF).sum(1))
    robust_A = examples.cross_entropy(examples.adversarial_logits_AK)
    return robust_A + examples.settings["weight"] * misalignment_A


GRAD_ALIGN = register(
    Objective(
        name="grad_align",
        source="Andriushchenko and Flammarion, NeurIPS 2020",
        loss=grad_align_loss,
        attack=AttackDefaults(steps=1, step_share=1.0, start="none", single_step=True),
        settings={"weight": 0.2},
        needs=frozenset({"clean_logits", "noisy_logits", "input_gradient"}),
    )
)
