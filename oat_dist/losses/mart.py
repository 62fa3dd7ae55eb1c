"""MART: a cross-entropy with a margin, and a divergence that counts most where the clean image is misclassified.

Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples" (ICLR 2020), with their
lambda called beta, 5 as in their code:

    BCE(p', y) + beta KL(p || p') (1 - p[y]),    BCE(p', y) = -log p'[y] - log(1 - max over k != y of p'[k])

p and p' are the probabilities of the clean and the adversarial image. Gradients flow through 1 - p[y] too, as in their
code. x' is PGD-10 on the cross-entropy, steps of eps / 4 from a random start; their code starts at Gaussian noise of
deviation 0.001. Letters as in `objective.py`.
"""

import torch
from torch import Tensor

from oat_dist.losses.objective import AttackDefaults, Examples, Objective, kl_divergence, register


def mart_loss(examples: Examples) -> Tensor:
    """[A] BCE(adversarial) + beta KL(clean || adversarial) (1 - clean probability of the label)."""
    logits_AK, label_A1 = examples.adversarial_logits_AK, examples.label_A[:, None]
    rival_A1 = logits_AK.scatter(1, label_A1, -torch.inf).argmax(1, keepdim=True)
    # log(1 - p[k]) as log of the sum of the other probabilities: exact however close p[k] is to 1.
    others_A = logits_AK.scatter(1, rival_A1, -torch.inf).logsumexp(1)
    bce_A = examples.cross_entropy(logits_AK) + logits_AK.logsumexp(1) - others_A
    divergence_A = kl_divergence(examples.clean_logits_AK, logits_AK)
    wrong_A = 1 - examples.clean_logits_AK.softmax(1).gather(1, label_A1)[:, 0]
    return bce_A + examples.settings["beta"] * divergence_A * wrong_A


MART = register(
    Objective(
        name="mart",
        source="Wang et al., ICLR 2020",
        loss=mart_loss,
        attack=AttackDefaults(steps=10, step_share=0.25),
        settings={"beta": 5.0},
        needs=frozenset({"clean_logits"}),
    )
)
