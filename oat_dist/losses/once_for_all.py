"""The once-for-all objective: every image weighs clean against robust loss by its own lambda.

Wang et al., "Once-for-All Adversarial Training" (NeurIPS 2020), equation 2:

    loss(x, y, lambda) = (1 - lambda) * CE(f(x, lambda), y) + lambda * L_a(x, x_adv, y, lambda)

or, where lambda drives a weight of the robust term itself (`loss.condition_on`),

    loss(x, y, lambda) = L_a(x, x_adv, y; weight = lambda * the configured one)

Letters: N images, A of them (the last) with an adversarial partner, M of them with clean logits, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def once_for_all_loss(
    clean_logits_MK: Tensor,
    robust_A: Tensor,
    label_N: Tensor,
    lam_N: Tensor,
    *,
    label_smoothing: float,
    clean_M: Tensor | None = None,
    is_driven: bool = False,
    target_MK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-image losses of a batch in which the images with lambda = 0 come first.

    Args:
        clean_logits_MK: Logits of the clean images.
        robust_A: L_a of the last A images.
        label_N: Classes.
        lam_N: Weights in [0, 1], in the dtype of the losses; 0 for the first N - A images.
        label_smoothing: Share of the target spread over all classes.
        clean_M: [M] int64 positions of the images that have clean logits, when some with lambda = 1, whose clean
            weight is 0, have none; None: all have (M = N).
        is_driven: Whether lambda is inside L_a already, which then stands alone.
        target_MK: Probabilities to learn from the clean images in place of the labels.

    Returns:
        (loss_N, clean_M): the weighted loss and its clean term.
    """
    if target_MK is None:
        label_M = label_N if clean_M is None else label_N.index_select(0, clean_M)
        clean_loss_M = F.cross_entropy(clean_logits_MK, label_M, reduction="none", label_smoothing=label_smoothing)
    else:
        clean_loss_M = F.cross_entropy(clean_logits_MK, target_MK, reduction="none")
    first = len(label_N) - len(robust_A)
    if is_driven:
        return torch.cat((clean_loss_M[:first], robust_A)), clean_loss_M
    if clean_M is None:
        weighted_N = (1 - lam_N) * clean_loss_M
    else:
        weighted_M = (1 - lam_N.index_select(0, clean_M)) * clean_loss_M
        weighted_N = torch.zeros_like(lam_N).index_copy(0, clean_M, weighted_M)
    loss_N = torch.cat((weighted_N[:first], weighted_N[first:] + lam_N[first:] * robust_A))
    return loss_N, clean_loss_M
