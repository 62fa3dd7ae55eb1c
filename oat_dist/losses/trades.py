"""TRADES: clean cross-entropy, and how far the adversarial prediction is from the clean one.

Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (ICML 2019), equation 5, with their
1/lambda called beta: CE(f(x), y) + beta KL(f(x) || f(x')). x' makes the same divergence large (their Algorithm 1): ten
steps of about eps / 4 from a Gaussian start of deviation 0.001. Letters as in `objective.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from oat_dist.attacks import at_least_float32
from oat_dist.losses.objective import AttackDefaults, Examples, Objective, kl_divergence, register


def trades_loss(examples: Examples) -> Tensor:
    """[A] CE(clean) + beta KL(clean || adversarial)."""
    divergence_A = kl_divergence(examples.clean_logits_AK, examples.adversarial_logits_AK)
    return examples.cross_entropy(examples.clean_logits_AK) + examples.settings["beta"] * divergence_A


def divergence_from_clean(
    logits_fn: Callable[[Tensor], Tensor], x: Tensor, label: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """KL(clean || adversarial), summed over images, as what an attack makes large: one forward of the clean images."""
    with torch.no_grad():
        clean = at_least_float32(logits_fn(x))
    return lambda x_adv, logits: kl_divergence(clean, at_least_float32(logits)).sum()


TRADES = register(
    Objective(
        name="trades",
        source="Zhang et al., ICML 2019, eq. 5",
        loss=trades_loss,
        attack=AttackDefaults(
            steps=10,
            step_share=0.25,
            start="gaussian",
            start_size=0.001,
            maximise=divergence_from_clean,
            preparation=(1, 0),
        ),
        settings={"beta": 6.0},
        conditionable=("beta",),
        needs=frozenset({"clean_logits"}),
    )
)
