"""The attacks of an evaluation, and the names they go by.

A name is `kind`, `kind-steps` or `kind-stepsxrestarts`: pgd-50, cw-20x5, mim-10, pgd-t-20, square-1000. `autoattack`
stands for the four attacks of its standard version (Croce and Hein, "Reliable Evaluation of Adversarial Robustness with
an Ensemble of Diverse Parameter-free Attacks", ICML 2020, section 5).
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from oat_dist.config import Config, default_step_size
from oat_dist.errors import UserError

ITERATED = ("pgd", "cw", "mim", "pgd-t")
"""Our own gradient attacks (`iterated.py`); in the norms of `oat_dist.attacks.NORMS`."""
EXTERNAL = {"apgd-ce": 100, "apgd-t": 100, "fab-t": 100, "square": 5000}
"""The attacks of AutoAttack (`autoattack.py`) and their standard number of steps or queries; in every norm."""
EVALUATION_NORMS = ("linf", "l2", "l1")
"""Norms of the ball; l1 is for the attacks of AutoAttack alone."""
L1_APGD_RESTARTS = 5
"""Random starts of apgd-ce in the standard version for L1 (pyautoattack, `AutoAttack._set_version`)."""
MOMENTUM = 1.0
"""Decay of the momentum of mim (Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, section 4.1)."""

_NAME = re.compile(r"(?P<kind>[a-z]+(?:-[a-z]+)?)(?:-(?P<steps>\d+)(?:x(?P<restarts>\d+))?)?")


@dataclass(frozen=True, kw_only=True)
class EvaluationAttack:
    """One attack as an evaluation uses it; lengths in pixel units of [0, 1]."""

    eps: float
    """Radius of the ball."""
    steps: int = 20
    """Gradient steps (or queries) per restart."""
    norm: str = "linf"
    """Norm of the ball."""
    step_size: float | None = None
    """Length of a step of `ITERATED` attacks; default min(1.25 eps, eps + 4/255) / steps, of mim eps / steps."""
    restarts: int = 1
    """Starts; an image must withstand all."""
    kind: str = "pgd"
    """One of `ITERATED` or `EXTERNAL`."""
    targets: int | None = None
    """Wrong classes that pgd-t aims at, most likely first; default all."""

    @classmethod
    def of(cls, config: Config) -> "EvaluationAttack":
        """The attack of a configuration's measurements: ball of `attack`, steps and restarts of `evaluation`."""
        cfg = config.evaluation
        return cls(norm=config.attack.norm, eps=config.attack.eps, steps=cfg.steps, restarts=cfg.restarts)

    @property
    def name(self) -> str:
        """As papers write it, e.g. pgd-20."""
        standard_restarts = _standard_restarts(self.kind, self.norm)
        if self.restarts == standard_restarts and self.steps == EXTERNAL.get(self.kind):
            return self.kind
        return f"{self.kind}-{self.steps}" + (f"x{self.restarts}" if self.restarts != standard_restarts else "")

    @property
    def parts(self) -> "tuple[EvaluationAttack, ...]":
        """The attacks that an image must withstand, in their order: this one."""
        return (self,)

    @property
    def is_iterated(self) -> bool:
        """Whether it is one of our own gradient attacks."""
        return self.kind in ITERATED

    @property
    def length(self) -> float:
        """Length of a step, the default filled in."""
        if self.step_size is not None:
            return self.step_size
        return self.eps / self.steps if self.kind == "mim" else default_step_size(self.eps, self.steps)

    def to_dict(self) -> dict:
        """For the JSON report, with every default spelled out."""
        about = {"name": self.name, **asdict(self), "success": "any iterate"}
        del about["kind"], about["targets"]
        if not self.is_iterated:
            del about["step_size"]
            return about | {"source": "pyautoattack"}
        about["step_size"] = self.length
        if self.kind == "pgd-t":
            about["targets"] = self.targets or "all"
        return about | ({"momentum": MOMENTUM} if self.kind == "mim" else {})


@dataclass(frozen=True)
class AttackList:
    """Attacks in one ball that an image must withstand one after the other; what broke goes on to none."""

    name: str
    """Their names as they were asked for, joined by +."""
    norm: str
    """Norm of the ball."""
    eps: float
    """Radius of the ball."""
    parts: tuple[EvaluationAttack, ...]
    """Perhaps none, where accuracy without an attack is all that is wanted."""

    def to_dict(self) -> dict:
        """For the JSON report."""
        parts = [part.to_dict() for part in self.parts]
        return {"name": self.name, "eps": self.eps, "norm": self.norm, "attacks": parts}


def parse_attacks(
    names: Sequence[str],
    *,
    eps: float,
    norm: str,
    steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
    targets: int | None = None,
) -> EvaluationAttack | AttackList:
    """The attacks that names ask for.

    Args:
        names: At least one, as above.
        eps: Radius of the ball, pixel units of [0, 1].
        norm: One of `EVALUATION_NORMS`.
        steps: Steps of our own attacks whose name has none.
        restarts: Starts of our own attacks whose name has none.
        step_size: Length of a step of our own attacks; default as in `EvaluationAttack`.
        targets: Wrong classes that pgd-t aims at; default all.

    Raises:
        UserError: An unknown name or norm, or an attack that does not exist in this norm.
    """
    if norm not in EVALUATION_NORMS:
        raise UserError(f"--norm={norm}: unknown; expected one of {', '.join(EVALUATION_NORMS)}")
    parts: list[EvaluationAttack] = []
    for name in names:
        match = _NAME.fullmatch(name)
        kind = match["kind"] if match else name
        if kind not in (*ITERATED, *EXTERNAL) and name != "autoattack":
            known = ", ".join((*(f"{kind}-STEPS[xRESTARTS]" for kind in ITERATED), "autoattack", *EXTERNAL))
            raise UserError(f"--attack={name}: unknown; expected {known}")
        if kind in ITERATED and norm == "l1":
            offered = ", ".join(("autoattack", *EXTERNAL))
            raise UserError(f"--attack={name}: is not defined in l1; l1 is offered by {offered}")
        given = {key: int(match[key]) for key in ("steps", "restarts") if match and match[key]}
        if 0 in given.values():
            raise UserError(f"--attack={name}: steps and restarts must be at least 1")
        if kind in ITERATED:
            ours = {"steps": steps, "restarts": restarts, "step_size": step_size, **given}
            if kind == "pgd-t":
                ours["targets"] = targets
            parts.append(EvaluationAttack(kind=kind, eps=eps, norm=norm, **ours))
            continue
        for one in EXTERNAL if name == "autoattack" else (kind,):
            standard = {"steps": EXTERNAL[one], "restarts": _standard_restarts(one, norm)}
            parts.append(EvaluationAttack(kind=one, eps=eps, norm=norm, **(standard | given)))
    return parts[0] if len(parts) == 1 else AttackList("+".join(names), norm, eps, tuple(parts))


def _standard_restarts(kind: str, norm: str) -> int:
    return L1_APGD_RESTARTS if kind == "apgd-ce" and norm == "l1" else 1
