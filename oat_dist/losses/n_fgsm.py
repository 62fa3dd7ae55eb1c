"""N-FGSM: cross-entropy on the adversarial image of one step from a strongly noisy one.

De Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training" (NeurIPS 2022):
uniform noise of radius k eps with k = 2, one step of eps, and no way back into the ball, only into [0, 1]: x' may be
3 eps from x. Letters as in `objective.py`.
"""

from oat_dist.losses.objective import AttackDefaults, Objective, register
from oat_dist.losses.pgd_at import pgd_at_loss

N_FGSM = register(
    Objective(
        name="n_fgsm",
        source="de Jorge et al., NeurIPS 2022",
        loss=pgd_at_loss,
        attack=AttackDefaults(steps=1, step_share=1.0, start_size=2.0, project=False, single_step=True),
    )
)
