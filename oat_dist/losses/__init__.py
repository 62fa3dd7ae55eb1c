"""Objectives: per-image losses. `ROBUST` names the robust terms L_a, `once_for_all` weighs them by lambda."""

from oat_dist.losses.objective import ROBUST, Objective, robust_term
from oat_dist.losses.once_for_all import once_for_all_loss
from oat_dist.losses.pgd_at import pgd_at_loss

__all__ = ["ROBUST", "Objective", "once_for_all_loss", "pgd_at_loss", "robust_term"]
