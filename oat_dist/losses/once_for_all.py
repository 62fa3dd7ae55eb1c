"""The once-for-all objective: every image weighs clean against robust loss by its own lambda.

Wang et al., "Once-for-All Adversarial Training" (NeurIPS 2020), equation 2:

    loss(x, y, lambda) = (1 - lambda) * CE(f(x, lambda), y) + lambda * L_a(x, x_adv, y, lambda)

Letters: N images, A of them (the last) with an adversarial partner, M of them with clean logits, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from oat_dist.losses.objective import Objective


def once_for_all_loss(
    clean_logits_MK: Tensor,
    adversarial_logits_AK: Tensor,
    label_N: Tensor,
    lam_N: Tensor,
    *,
    robust: Objective,
    label_smoothing: float,
    clean_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-image losses of a batch in which the images with lambda = 0 come first.

    Args:
        clean_logits_MK: Logits of the clean images.
        adversarial_logits_AK: Logits of the adversarial partners of the last A images.
        label_N: Classes.
        lam_N: Weights in [0, 1], in the dtype of the losses; 0 for the first N - A images.
        robust: L_a, one of `oat_dist.losses.ROBUST`.
        label_smoothing: Share of the target spread over all classes.
        clean_M: [M] int64 positions of the images that have clean logits, when some with lambda = 1, whose clean
            weight is 0, have none; None: all have (M = N).

    Returns:
        (loss_N, clean_M, robust_A): the weighted loss and its two terms.
    """
    label_M = label_N if clean_M is None else label_N.index_select(0, clean_M)
    clean_loss_M = F.cross_entropy(clean_logits_MK, label_M, reduction="none", label_smoothing=label_smoothing)
    first = len(label_N) - len(adversarial_logits_AK)
    clean_logits_AK = clean_logits_MK[first:] if clean_M is None else None
    robust_A = robust.fn(clean_logits_AK, adversarial_logits_AK, label_N[first:], label_smoothing=label_smoothing)
    if clean_M is None:
        weighted_N = (1 - lam_N) * clean_loss_M
    else:
        weighted_M = (1 - lam_N.index_select(0, clean_M)) * clean_loss_M
        weighted_N = torch.zeros_like(lam_N).index_copy(0, clean_M, weighted_M)
    loss_N = torch.cat((weighted_N[:first], weighted_N[first:] + lam_N[first:] * robust_A))
    return loss_N, clean_loss_M, robust_A
