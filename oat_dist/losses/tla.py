"""Triplet loss adversarial training: the adversarial image stays with its class in the space of features.

Mao et al., "Metric Learning for Adversarial Robustness" (NeurIPS 2019). With h the penultimate features,
a = h(x'), p = h of a clean image of the same class, n = h of a clean image of another class,

    CE(f(x'), y) + triplet max(D(a, p) - D(a, n) + margin, 0) + norm mean(a^2 + p^2 + n^2),    D(u, v) = 1 - |cos(u, v)|

triplet and norm are their lambda_1 and lambda_2; margin 0.03, triplet 2, norm 2 * 0.001 and the mean over features are
those of their code for CIFAR-10 (columbia/Metric_Learning_Adversarial_Robustness), as are seven steps of eps / 4. p is
the next image of its class in the micro-batch, which is in random order, and the clean image itself where there is no
other; n is the one nearest to a. Their code draws p, and looks for n, among further images of the data set.
Letters as in `objective.py`.
"""

import torch
from torch import Tensor

from oat_dist.errors import UserError
from oat_dist.losses.objective import AttackDefaults, Examples, Objective, direction, register


def tla_loss(examples: Examples) -> Tensor:
    """[A] CE(adversarial) + triplet loss + norm.

    Raises:
        UserError: All images are of one class.
    """
    loss_A = examples.cross_entropy(examples.adversarial_logits_AK)
    if len(loss_A) == 0:
        return loss_A
    same_AA = examples.label_A[:, None] == examples.label_A
    # The one place where a step waits for the device: without a negative there is no triplet.
    if bool(same_AA.all()):
        raise UserError(
            f"optim.batch_size: all {len(loss_A)} attacked images of a micro-batch are of one class, and "
            "loss.robust=tla needs two: a larger batch, or smaller engine.accumulation"
        )
    a_AF, clean_AF = examples.adversarial_features_AF, examples.clean_features_AF
    with torch.no_grad():
        nearness_AA = (direction(a_AF) @ direction(clean_AF).T).abs()
        negative_A = nearness_AA.masked_fill(same_AA, -1).argmax(1)
    p_AF, n_AF = (clean_AF.index_select(0, index_A) for index_A in (_next_of_class(same_AA), negative_A))
    triplet_A = (_distance(a_AF, p_AF) - _distance(a_AF, n_AF) + examples.settings["margin"]).clamp(min=0)
    norm_A = (a_AF.square() + p_AF.square() + n_AF.square()).mean(1)
    return loss_A + examples.settings["triplet"] * triplet_A + examples.settings["norm"] * norm_A


def _next_of_class(same_AA: Tensor) -> Tensor:
    """[A] positions of the next image of the class of each, in a circle."""
    num = len(same_AA)
    at_A = torch.arange(num, device=same_AA.device)
    ahead_AA = (at_A - at_A[:, None] - 1) % num  # the image itself comes last
    return ahead_AA.masked_fill(~same_AA, num).argmin(1)


def _distance(u_AF: Tensor, v_AF: Tensor) -> Tensor:
    """[A] angular distances, 1 where one vector is 0."""
    return 1 - (direction(u_AF) * direction(v_AF)).sum(1).abs()


TLA = register(
    Objective(
        name="tla",
        source="Mao et al., NeurIPS 2019",
        loss=tla_loss,
        attack=AttackDefaults(steps=7, step_share=0.25),
        settings={"triplet": 2.0, "norm": 0.002, "margin": 0.03},
        needs=frozenset({"clean_logits", "features"}),
    )
)
