"""Robust self-training: TRADES' loss on labelled images and on images that a standard network labelled.

Carmon et al., "Unlabeled Data Improves Adversarial Robustness" (NeurIPS 2019), Algorithm 1: train a standard network
(launch/pseudo_label.py has it label the images), then minimise, over both kinds, L_standard + beta L_reg, that is
CE(f(x), y) + beta KL(f(x) || f(x')), with y the label or pseudo-label. beta = 6 and half of each batch without labels,
which weigh as much as the others (w = 1), are the defaults of the published code: here `loss.settings.beta`,
`data.extra_share`, `data.extra_weight`.

`rst_adv`: x' maximises the divergence, the attack of TRADES. `rst_stab` (stability training; Zheng et al., "Improving
the Robustness of Deep Neural Networks via Stability Training", CVPR 2016): x' is x with Gaussian noise of deviation
0.25 of the pixel range; no gradient is taken, and `attack.eps_255` matters to measurements alone. x' is clamped to
[0, 1], as in the published code; its formula has plain noise. Letters as in `objective.py`.
"""

from oat_dist.losses.objective import AttackDefaults, Objective, register
from oat_dist.losses.trades import TRADES, trades_loss

_NEEDS = frozenset({"clean_logits", "extra_data"})

RST_ADV = register(
    Objective(
        name="rst_adv",
        source="Carmon et al., NeurIPS 2019, Algorithm 1 with adversarial training",
        loss=trades_loss,
        attack=TRADES.attack,
        settings={"beta": 6.0},
        conditionable=("beta",),
        needs=_NEEDS,
    )
)

RST_STAB = register(
    Objective(
        name="rst_stab",
        source="Carmon et al., NeurIPS 2019, Algorithm 1 with stability training",
        loss=trades_loss,
        attack=AttackDefaults(steps=0, start="gaussian", start_size=0.25, project=False),
        settings={"beta": 6.0},
        conditionable=("beta",),
        needs=_NEEDS,
    )
)
