"""Adversarial logit pairing: clean and adversarial cross-entropy, and the distance between their logits.

Kannan et al., "Adversarial Logit Pairing" (arXiv 1803.06373, 2018):

    (CE(f(x), y) + CE(f(x'), y)) / 2 + weight * |f(x) - f(x')|^2

The cross-entropies are a mean, since theirs is the mean over a minibatch that is half clean, half adversarial; weight 0
is PGD-AT on both. The distance is summed over the classes, as the L2 loss is written; their code
(tensorflow/models, adversarial_logit_pairing) takes the mean over classes, so its weight is K times ours. Their attack
differs from data set to data set; ten steps of eps / 4 from a uniform start are our default. Letters as in
`objective.py`.
"""

from torch import Tensor

from oat_dist.losses.objective import AttackDefaults, Examples, Objective, register


def alp_loss(examples: Examples) -> Tensor:
    """[A] mean of CE(clean) and CE(adversarial) + weight |clean logits - adversarial logits|^2."""
    clean_AK, adversarial_AK = examples.clean_logits_AK, examples.adversarial_logits_AK
    mixed_A = (examples.cross_entropy(clean_AK) + examples.cross_entropy(adversarial_AK)) / 2
    return mixed_A + examples.settings["weight"] * (clean_AK - adversarial_AK).square().sum(1)


ALP = register(
    Objective(
        name="alp",
        source="Kannan et al., arXiv 1803.06373",
        loss=alp_loss,
        attack=AttackDefaults(steps=10, step_share=0.25),
        settings={"weight": 0.5},
        needs=frozenset({"clean_logits"}),
    )
)
