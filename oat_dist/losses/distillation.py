"""In-place distillation: a narrower width learns what the whole network answers, at the same lambda of every image.

Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques" (ICCV 2019): the whole network learns
from labels, the others from its predicted probabilities. Here the robust term asks for its answer to its own
adversarial image, while the width's own attack goes on against the label. Letters as in `objective.py`.
"""

import torch.nn.functional as F
from torch import Tensor

from oat_dist.losses.objective import Examples, Objective


def learning_from(logits_AK: Tensor) -> Objective:
    """Cross-entropy with a teacher's probabilities as the robust term.

    Args:
        logits_AK: What the teacher answered on its adversarial images, without a graph.
    """
    target_AK = logits_AK.softmax(1)

    def loss(examples: Examples) -> Tensor:
        return F.cross_entropy(examples.adversarial_logits_AK, target_AK, reduction="none")

    return Objective(name="distillation", source="Yu and Huang, ICCV 2019", loss=loss)
