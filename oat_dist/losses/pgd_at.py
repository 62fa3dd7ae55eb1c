"""PGD adversarial training: cross-entropy on the adversarial image.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018), equation 2.1.

Letters: N images, K classes.
"""

import torch.nn.functional as F
from torch import Tensor


def pgd_at_loss(
    clean_logits_NK: Tensor | None, adversarial_logits_NK: Tensor, label_N: Tensor, *, label_smoothing: float
) -> Tensor:
    """[N] cross-entropy on the adversarial images; the clean logits are not used."""
    return F.cross_entropy(adversarial_logits_NK, label_N, reduction="none", label_smoothing=label_smoothing)
