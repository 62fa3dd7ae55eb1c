"""Objectives: per-image losses. One file per method; `ROBUST` holds the robust terms L_a by name."""

from oat_dist.losses import alp, fgsm, fgsm_rs, grad_align, llr, mart, min_max, n_fgsm, pgd_at, rst, tla, trades
from oat_dist.losses.objective import ROBUST, AttackDefaults, Examples, Objective, register, unregister
from oat_dist.losses.once_for_all import once_for_all_loss
from oat_dist.losses.selection import attack_plan, find_objective, require_setting, robust_term, settings_at

METHODS = (fgsm, min_max, pgd_at, alp, trades, mart, llr, tla, fgsm_rs, n_fgsm, grad_align, rst)
"""The files that register themselves on import."""

__all__ = [
    "METHODS",
    "ROBUST",
    "AttackDefaults",
    "Examples",
    "Objective",
    "attack_plan",
    "find_objective",
    "once_for_all_loss",
    "register",
    "require_setting",
    "robust_term",
    "settings_at",
    "unregister",
]
