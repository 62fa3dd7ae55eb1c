"""A guard against catastrophic overfitting of single-step adversarial training.

A network trained on single-step adversaries may, within an epoch, learn to withstand these alone: its accuracy under
PGD falls to 0 while that under the attack of training rises (Wong et al., "Fast is better than free: Revisiting
adversarial training", ICLR 2020, section 5.4). So the guard measures PGD after every epoch, before anything of the
epoch is written. What it found is in guard.json of the run folder, so that a run that is killed later knows.

This file finds and records a collapse. Going back is what a resumed run does (`resume.rewind`, `training.Training`).
"""

import json
import math
import pathlib
from dataclasses import asdict, dataclass

from oat_dist.checkpoint import CheckpointStore
from oat_dist.config import ConditioningConfig, Config
from oat_dist.data import PreparedData, evaluation_batches
from oat_dist.distributed import World
from oat_dist.errors import UserError, require
from oat_dist.evaluation import EvaluationAttack, evaluate
from oat_dist.losses import robust_term
from oat_dist.metrics import MetricsWriter
from oat_dist.models.network import ConditionalNetwork
from oat_dist.weights import whole_file

_FILE = "guard.json"
_STEPS = 10
_DEVIATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """One breakdown of robust accuracy and what was done, as guard.json holds it."""

    epoch: int
    """The epoch at whose end it was found, from 1."""
    step: int
    """Optimiser steps done by then."""
    ra_before: float
    """Best robust accuracy of the epochs before, in [0, 1]."""
    ra_after: float
    """Robust accuracy at the end of the epoch, in [0, 1]."""
    restored_step: int
    """Step of the checkpoint that training went back to; 0 is the initial state."""
    action: str
    """`switch` or `stop`."""

    @property
    def sentence(self) -> str:
        """What happened, in one line."""
        fell = f"robust accuracy fell from {self.ra_before:.1%} to {self.ra_after:.1%} in epoch {self.epoch}"
        then = "from there multi-step PGD" if self.action == "switch" else "where training ends"
        return f"attack.guard: {fell} (catastrophic overfitting); back to step {self.restored_step}, {then}"


def guard_action(config: Config) -> str:
    """What `attack.guard` comes to: switch, stop, or none. None where no image is attacked, at lambda = 0 alone."""
    if config.conditioning.mass_at_zero == 1:
        return "none"
    if config.attack.guard == "auto":
        return "switch" if robust_term(config).attack.single_step else "none"
    return config.attack.guard


def needs_validation(config: Config, data: PreparedData) -> bool:
    """Whether the guard will measure the validation split.

    Raises:
        UserError: It would, and the data set has none.
    """
    if guard_action(config) == "none":
        return False
    expected = f"measures the validation split, which data set {data.name} lacks; prepare one, or set attack.guard=none"
    require(data.counts.get("val", 0) > 0, "attack.guard", config.attack.guard, expected)
    return True


def has_collapsed(ra: float, best: float, *, drop: float, num_images: int, num_classes: int) -> bool:
    """The verdict.

    Args:
        ra: Robust accuracy now, in [0, 1].
        best: Best robust accuracy so far, in [0, 1], or -inf.
        drop: Share of it that must be lost, in (0, 1).
        num_images: Images they were measured on.
        num_classes: Classes.

    Returns:
        Whether `ra` is below (1 - drop) * best, with a best that three standard deviations of guessing do not explain:
        a network that guesses has nothing to lose, and a constant one is as robust as it is accurate.
    """
    chance = 1 / num_classes
    explained = chance + _DEVIATIONS * math.sqrt(chance * (1 - chance) / num_images)
    return best > explained and ra < (1 - drop) * best


class Guard:
    """Measures the trained network after every epoch and says whether training may go on."""

    def __init__(self, config: Config, data: PreparedData, *, world: World, store: CheckpointStore) -> None:
        """Read the images.

        Args:
            config: Configuration of the run; its `guard_action` is not none.
            data: Its data set.
            world: The ranks that share the images.
            store: Checkpoints of the run.
        """
        cfg = config.attack
        self.config, self.world, self.store = config, world, store
        self.num_images, self.num_classes = min(cfg.guard_images, data.counts["val"]), len(data.classes)
        self.lam = _largest_lambda(config.conditioning)
        self.attack = EvaluationAttack(norm=cfg.norm, eps=cfg.eps, steps=_STEPS)
        # At least a batch for every rank.
        size = min(config.evaluation.batch_size, -(-self.num_images // world.ranks))
        self.batches = evaluation_batches(
            data, "val", config.data, size, num_images=self.num_images, device=world.device
        )
        self.best = float("-inf")

    def passes(self, network: ConditionalNetwork, metrics: MetricsWriter, *, epoch: int, step: int) -> bool:
        """Measure; every rank must call, and all come to the same verdict.

        Args:
            network: The network that is trained, equal on all ranks.
            metrics: Gets `guard_ra`.
            epoch: Epochs done.
            step: Optimiser steps done.

        Returns:
            True; or False after a collapse, which guard.json then tells of and the main rank has printed.
        """
        (point,) = evaluate(network, self.batches, (self.lam,), self.attack, seed=self.config.seed, world=self.world)
        ra = point["ra"]
        metrics.write(step, {"guard_ra": ra})
        drop, sizes = self.config.attack.guard_drop, {"num_images": self.num_images, "num_classes": self.num_classes}
        if not has_collapsed(ra, self.best, drop=drop, **sizes):
            self.best = max(self.best, ra)
            return True

        def record() -> None:
            checkpoint = self.store.newest(whole_epochs=True)
            collapse = Collapse(
                epoch=epoch, step=step, ra_before=self.best, ra_after=ra,
                restored_step=checkpoint.step if checkpoint else 0, action=guard_action(self.config),
            )  # fmt: skip
            with whole_file(self.store.folder.parent / _FILE) as temporary:
                temporary.write_text(json.dumps(asdict(collapse), indent=1) + "\n")
            print(collapse.sentence)

        self.world.on_main(record)
        return False


def read_collapse(run: pathlib.Path) -> Collapse | None:
    """What guard.json of a run tells, or None where nothing collapsed.

    Raises:
        UserError: It is damaged.
    """
    path = run / _FILE
    if not path.exists():
        return None
    try:
        return Collapse(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; start anew with checkpoint.resume=never") from None


def forget_collapse_after(run: pathlib.Path, step: int) -> None:
    """Drop a collapse whose checkpoint lies after a step: a run that goes on from there has it still to come."""
    collapse = read_collapse(run)
    if collapse is not None and collapse.restored_step > step:
        (run / _FILE).unlink()


def _largest_lambda(cfg: ConditioningConfig) -> float:
    """The largest lambda that is trained."""
    return {"discrete": cfg.lambdas[-1], "uniform": cfg.high, "beta": 1.0}[cfg.distribution]
