"""FGSM adversarial training: a mixture of the cross-entropies of the clean image and of its FGSM neighbour.

Goodfellow et al., "Explaining and Harnessing Adversarial Examples" (ICLR 2015), section 6:
alpha CE(f(x), y) + (1 - alpha) CE(f(x'), y) with alpha = 0.5 and x' = x + eps sign(grad), one step from x itself.
Letters as in `objective.py`.
"""

from torch import Tensor

from oat_dist.losses.objective import AttackDefaults, Examples, Objective, register


def fgsm_loss(examples: Examples) -> Tensor:
    """[A] alpha CE(clean) + (1 - alpha) CE(adversarial)."""
    alpha = examples.settings["alpha"]
    clean_A = examples.cross_entropy(examples.clean_logits_AK)
    return alpha * clean_A + (1 - alpha) * examples.cross_entropy(examples.adversarial_logits_AK)


FGSM = register(
    Objective(
        name="fgsm",
        source="Goodfellow et al., ICLR 2015, section 6",
        loss=fgsm_loss,
        attack=AttackDefaults(steps=1, step_share=1.0, start="none", single_step=True),
        settings={"alpha": 0.5},
        at_most_one=("alpha",),
        needs=frozenset({"clean_logits"}),
    )
)
