"""Min-max training with a linearised inner problem: cross-entropy on the perturbed image alone.

Shaham et al., "Understanding Adversarial Training: Increasing Local Stability of Supervised Models through Robust
Optimization" (Neurocomputing 2018), Algorithm 1. The inner maximum over the ball is that of the first-order Taylor
expansion of the loss around x: one step of length eps in the direction of steepest ascent for the norm of the ball (the
sign of the gradient for linf, the gradient itself for l2). PGD-AT differs by many smaller steps from a random start,
`fgsm` by the clean cross-entropy beside (this is its alpha = 0), FGSM-RS by a random start and a longer step.
Letters as in `objective.py`.
"""

from oat_dist.losses.objective import AttackDefaults, Objective, register
from oat_dist.losses.pgd_at import pgd_at_loss

MIN_MAX = register(
    Objective(
        name="min_max",
        source="Shaham et al., Neurocomputing 2018, Algorithm 1",
        loss=pgd_at_loss,
        attack=AttackDefaults(steps=1, step_share=1.0, start="none", single_step=True),
    )
)
