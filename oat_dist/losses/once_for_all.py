"""The once-for-all objective: every image weighs clean against robust loss by its own lambda.

Wang et al., "Once-for-All Adversarial Training" (NeurIPS 2020), equation 2:

    loss(x, y, lambda) = (1 - lambda) * CE(f(x, lambda), y) + lambda * L_a(x, x_adv, y, lambda)

Letters: N images, A of them (the last) with an adversarial partner, K classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def once_for_all_loss(
    clean_logits_NK: Tensor,
    adversarial_logits_AK: Tensor,
    label_N: Tensor,
    lam_N: Tensor,
    *,
    robust: Callable[..., Tensor],
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-image losses of a batch in which the images with lambda = 0 come first.

    Args:
        clean_logits_NK: Logits of the clean images.
        adversarial_logits_AK: Logits of the adversarial partners of the last A images.
        label_N: Classes.
        lam_N: Weights in [0, 1], in the dtype of the losses; 0 for the first N - A images.
        robust: L_a, one of `oat_dist.losses.ROBUST`.
        label_smoothing: Share of the target spread over all classes.

    Returns:
        (loss_N, clean_N, robust_A): the weighted loss and its two terms.
    """
    clean_N = F.cross_entropy(clean_logits_NK, label_N, reduction="none", label_smoothing=label_smoothing)
    first = len(label_N) - len(adversarial_logits_AK)
    robust_A = robust(clean_logits_NK[first:], adversarial_logits_AK, label_N[first:], label_smoothing=label_smoothing)
    weighted_N = (1 - lam_N) * clean_N
    loss_N = torch.cat((weighted_N[:first], weighted_N[first:] + lam_N[first:] * robust_A))
    return loss_N, clean_N, robust_A
