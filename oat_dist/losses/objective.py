"""The robust terms L_a by name, and what each needs to know."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from oat_dist.config import LossConfig
from oat_dist.errors import UserError
from oat_dist.losses.pgd_at import pgd_at_loss


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One robust term."""

    fn: Callable[..., Tensor]
    """(clean_logits_NK or None, adversarial_logits_NK, label_N, *, label_smoothing) -> [N] losses."""
    needs_clean_logits: bool
    """Whether `fn` uses the clean logits, of every attacked image."""


ROBUST = {"pgd_at": Objective(fn=pgd_at_loss, needs_clean_logits=False)}


def robust_term(cfg: LossConfig) -> Objective:
    """The robust term of a configuration.

    Raises:
        UserError: It needs clean logits that `loss.clean_at_one` leaves out.
    """
    objective = ROBUST[cfg.robust]
    if objective.needs_clean_logits and not cfg.clean_at_one:
        raise UserError(
            f"loss.clean_at_one=False: must be true with loss.robust={cfg.robust}, which needs the clean logits of "
            "every attacked image"
        )
    return objective
