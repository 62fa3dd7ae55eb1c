"""PGD adversarial training: cross-entropy on the adversarial image.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018), equation 2.1. Letters as in
`objective.py`.
"""

from torch import Tensor

from oat_dist.losses.objective import Examples, Objective, register


def pgd_at_loss(examples: Examples) -> Tensor:
    """[A] cross-entropy on the adversarial images."""
    return examples.cross_entropy(examples.adversarial_logits_AK)


PGD_AT = register(Objective(name="pgd_at", source="Madry et al., ICLR 2018, eq. 2.1", loss=pgd_at_loss))
