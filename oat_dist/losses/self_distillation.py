"""Self-distillation between lambdas: what a network answers at lambda = 0 is part of the target at every other lambda.

    target(x, y, lambda > 0) = (1 - share) * label(y) + share * softmax(f(x, 0)),    target(x, y, 0) = label(y)

in the clean and in the robust term; label(y) is smoothed as configured. The teacher sees the clean image and is a
constant. Ours; Cui et al., "Learnable Boundary Guided Adversarial Training" (ICCV 2021), let a second network of
clean training guide the robust one. Letters: N images, A of them (the last) with lambda > 0, K classes.
"""

import torch
from torch import Tensor


def taught_targets(label_N: Tensor, answer_AK: Tensor, *, share: float, label_smoothing: float) -> Tensor:
    """Probabilities to learn in place of the labels.

    Args:
        label_N: int64 classes.
        answer_AK: What the network answers to the last A images at lambda = 0, as probabilities.
        share: Share of the answer, in [0, 1).
        label_smoothing: Share of the label's part that is spread over all classes.

    Returns:
        [N, K] in the dtype of the answers.
    """
    num_classes = answer_AK.shape[1]
    spread = label_smoothing / num_classes
    label_NK = answer_AK.new_full((len(label_N), num_classes), spread)
    label_NK = label_NK.scatter(1, label_N[:, None], 1 - label_smoothing + spread)
    zero_NK, positive_AK = label_NK.split((len(label_N) - len(answer_AK), len(answer_AK)))
    return torch.cat((zero_NK, (1 - share) * positive_AK + share * answer_AK))
