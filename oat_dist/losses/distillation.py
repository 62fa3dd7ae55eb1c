"""Learning probabilities in place of labels: of the whole network at a narrower width, or of another lambda.

In-place distillation: a narrower width learns what the whole network answers, at the same lambda of every image. Yu and
Huang, "Universally Slimmable Networks and Improved Training Techniques" (ICCV 2019): the whole network learns from
labels, the others from its predicted probabilities. Here the robust term asks for its answer to its own adversarial
image, while the width's own attack goes on against the label. For another lambda see `self_distillation.py`. Letters as
in `objective.py`.
"""

import torch.nn.functional as F
from torch import Tensor

from oat_dist.losses.objective import Examples, Objective


def learning_from(target_AK: Tensor) -> Objective:
    """Cross-entropy with given probabilities as the robust term.

    Args:
        target_AK: What is to be answered to the adversarial images, without a graph.
    """

    def loss(examples: Examples) -> Tensor:
        return F.cross_entropy(examples.adversarial_logits_AK, target_AK, reduction="none")

    return Objective(name="distillation", source="Yu and Huang, ICCV 2019", loss=loss)
