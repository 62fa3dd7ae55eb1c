"""FGSM from a random start: cross-entropy on the adversarial image of one long step.

Wong et al., "Fast is Better than Free: Revisiting Adversarial Training" (ICLR 2020), Algorithm 3: a uniform start in
the ball, one step of 1.25 eps, back into the ball. Letters as in `objective.py`.
"""

from oat_dist.losses.objective import AttackDefaults, Objective, register
from oat_dist.losses.pgd_at import pgd_at_loss

FGSM_RS = register(
    Objective(
        name="fgsm_rs",
        source="Wong et al., ICLR 2020, Algorithm 3",
        loss=pgd_at_loss,
        attack=AttackDefaults(steps=1, step_share=1.25, single_step=True),
    )
)
