"""The loop of an evaluation: every attack on every shard of the images in every cell of a plan.

A cell is a lambda that answers and a lambda that is attacked through, or lambda drawn at random. A shard is one of the
batches, the same whatever the number of ranks, because what AutoAttack does to an image depends on its neighbours. All
attacks of a (cell, shard) run one after the other on the same rank, each on the images that none broke before.

SA is the share of images classified correctly. RA is the share classified correctly clean and at every iterate of every
attack: the clean image lies in the ball too, so an image that is wrong without an attack is not robust.

Letters: N images of a shard, M images in all, C cells.
"""

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oat_dist.attacks import evaluation_mode
from oat_dist.data import Batch
from oat_dist.determinism import changing_shapes
from oat_dist.distributed import World
from oat_dist.evaluation import autoattack, iterated
from oat_dist.evaluation.ball import Ball
from oat_dist.evaluation.specs import AttackList, EvaluationAttack
from oat_dist.evaluation.surface import Surface, Surfaces
from oat_dist.evaluation.unit_log import Unit, UnitLog, evaluation_fingerprint, finished_units, unpacked
from oat_dist.models.network import ConditionalNetwork
from oat_dist.progress import progress_bar
from oat_dist.random import draw_keys

ROBUST = -1
"""Code of an image that nothing broke."""
CLEAN = 0
"""Code of an image that is wrong without an attack; i > 0 is the i-th attack."""


@dataclass(frozen=True)
class Cell:
    """Which lambda answers and which is attacked through."""

    lam: float | None
    """The lambda that answers; None: drawn anew, evenly from the plan's lambdas, for every image of every query."""
    via: float | None = None
    """The lambda that the attacker differentiates through; None: the one that answers."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the outcome beside network and images."""

    lambdas: tuple[float, ...]
    """Lambdas that answer, one after the other."""
    attack: EvaluationAttack | AttackList
    """What an image must withstand."""
    attack_lambdas: tuple[float, ...] = ()
    """Lambdas that the attacker may go through as well."""
    random_draws: int = 0
    """Draws of lambda that an attacker averages over, if lambda is to be drawn at random as well; 0: it is not."""
    width: float = 1.0
    """Share of the channels, one of the network's widths."""
    precision: str = "fp32"
    """Of the attack's gradients, `fp32` or `bf16`; every success is checked in float32."""
    seed: int = 0
    """Seed of random starts, keyed by image, of AutoAttack, keyed by shard, and of weight noise."""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Each lambda by itself, then each through others, then lambda at random."""
        plain = [Cell(lam) for lam in self.lambdas]
        through = [Cell(lam, via) for lam in self.lambdas for via in self.attack_lambdas if via != lam]
        return (*plain, *through, *([Cell(None)] if self.random_draws else []))

    def to_dict(self) -> dict:
        """For the fingerprint of an evaluation."""
        cells = [(cell.lam, cell.via) for cell in self.cells]
        about = {"cells": cells, "lambdas": self.lambdas, "attack": self.attack.to_dict(), "seed": self.seed}
        return about | {"draws": self.random_draws, "width": self.width, "precision": self.precision}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What broke every image in every cell."""

    plan: Plan
    """What was done."""
    index_M: Tensor
    """int64 dataset indices, on the host."""
    code_CM: Tensor
    """int8, on the host: `ROBUST`, `CLEAN` or the number of the attack, from 1."""
    outside: int
    """Points that were wrong but left the ball; they broke nothing."""
    fingerprint: str = ""
    """Names the files of finished units, which may go when the report is written; empty: there are none."""

    def of(self, lam: float | None, via: float | None = None) -> Tensor:
        """[M] codes of a cell; `via` may be the lambda that answers."""
        return self.code_CM[self.plan.cells.index(Cell(lam, None if via == lam else via))]


def evaluate(
    network: ConditionalNetwork,
    batches: Sequence[Batch],
    lambdas: Sequence[float],
    attack: EvaluationAttack | AttackList,
    *,
    seed: int = 0,
    world: World | None = None,
    width: float = 1.0,
) -> list[dict]:
    """Measure SA and RA at each lambda.

    A network with weight noise answers with the mean probabilities of `network.noise_draws` draws, and the attack goes
    through that mean (expectation over transformation: Athalye et al., ICML 2018).

    Args:
        network: The network, on the device of the batches and equal on all ranks; its mode is restored.
        batches: All images (`oat_dist.data.evaluation_batches`), the same on every rank.
        lambdas: Values in [0, 1]; the attack goes through the lambda that is measured.
        attack: The attack, or several.
        seed: Seed of the attacks.
        world: The ranks that share the work; default: this process does all.
        width: Share of the channels, one of the network's widths.

    Returns:
        One {"lam", "sa", "ra"} per lambda, with "width" too where the network has several; accuracies are fractions in
        [0, 1].
    """
    plan = Plan(lambdas=tuple(lambdas), attack=attack, width=width, seed=seed)
    told = {"width": width} if len(network.slimming.widths) > 1 else {}
    outcome = run_plan(network, batches, plan, world=world)
    points = []
    for lam in plan.lambdas:
        code = outcome.of(lam)
        points.append({"lam": lam, **told, "sa": _share(code != CLEAN), "ra": _share(code == ROBUST)})
    return points


def run_plan(
    network: ConditionalNetwork,
    batches: Sequence[Batch],
    plan: Plan,
    *,
    world: World | None = None,
    folder: pathlib.Path | None = None,
    about: object = None,
) -> Outcome:
    """Do all that a plan asks for; every rank must call.

    Args:
        network: As in `evaluate`.
        batches: As in `evaluate`.
        plan: What to do.
        world: The ranks that share the work; default: this process does all.
        folder: Where finished units are written down, and read again; None: nowhere.
        about: JSON values that name the images, for the fingerprint.

    Raises:
        UserError: The folder cannot be written.
    """
    world = world or World(device=network.sites[0].weight.device)
    finished, log, name = {}, None, ""
    sizes = [len(batch.label_N) for batch in batches]
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    # Codes are shifted by one, so that 0 is what other ranks measure.
    code_CM = torch.zeros(len(plan.cells), sum(sizes), dtype=torch.int64, device=world.device)
    outside = torch.zeros(1, dtype=torch.int64, device=world.device)
    tasks = [(cell, shard) for cell in range(len(plan.cells)) for shard in range(len(batches))]
    mine = tasks[world.rank :: world.ranks]
    total = len(mine) * (1 + len(plan.attack.parts))
    with contextlib.ExitStack() as stack:
        # Images that are broken leave, so batches shrink.
        stack.enter_context(changing_shapes())
        if folder is not None:
            name = world.on_main(lambda: evaluation_fingerprint(network, [plan.to_dict(), sizes, about]))
            finished = world.on_main(lambda: finished_units(folder, name))
            log = stack.enter_context(UnitLog(folder, name, world.rank))
        stack.enter_context(evaluation_mode(network))
        advance = stack.enter_context(progress_bar("evaluating", total, is_main=world.is_main))
        worker = _Worker(network, plan, finished, log, advance)
        for cell, shard in mine:
            code = worker.run(cell, shard, batches[shard])
            code_CM[cell, starts[shard] : starts[shard] + sizes[shard]] = code + 1
        outside += worker.outside
    return Outcome(
        plan=plan,
        index_M=torch.cat([batch.index_N for batch in batches]),
        code_CM=(world.sum(code_CM) - 1).to("cpu", torch.int8),
        outside=int(world.sum(outside)),
        fingerprint=name,
    )


class _Worker:
    """Runs the stages of (cell, shard) pairs on one rank."""

    def __init__(
        self,
        network: ConditionalNetwork,
        plan: Plan,
        finished: Mapping[Unit, dict],
        log: UnitLog | None,
        advance: Callable[[str | None], None],
    ) -> None:
        self.plan, self.finished, self.log, self.advance = plan, finished, log, advance
        lambdas = (*plan.lambdas, *plan.attack_lambdas)
        self.surfaces = Surfaces(network, lambdas, precision=plan.precision, width=plan.width, seed=plan.seed)
        self.outside = 0

    def run(self, cell: int, shard: int, batch: Batch) -> Tensor:
        """[N] codes of a shard in a cell."""
        code = torch.full_like(batch.label_N, ROBUST)
        for stage in range(1 + len(self.plan.attack.parts)):
            unit = (cell, shard, stage)
            if unit in self.finished:
                found = unpacked(self.finished[unit]["found"], len(code)).to(code.device)
                outside = self.finished[unit]["outside"]
            else:
                found, outside = self._stage(unit, batch, code == ROBUST)
                if self.log is not None:
                    self.log.add(unit, found, outside)
            code[found] = stage
            self.outside += outside
            self.advance(None)
        return code

    def _stage(self, unit: Unit, batch: Batch, robust: Tensor) -> tuple[Tensor, int]:
        """[N] bool: which robust images a stage breaks; and how many points left the ball."""
        _, shard, stage = unit
        surface = self._surface(unit)
        if stage == CLEAN:
            with torch.no_grad():
                return surface.decide(batch.image_NCHW).argmax(1) != batch.label_N, 0
        attack = self.plan.attack.parts[stage - 1]
        ball = Ball(attack.norm, attack.eps)
        left = robust.nonzero().flatten()
        if len(left) == 0:
            return torch.zeros_like(robust), 0
        x, label = batch.image_NCHW[left], batch.label_N[left]
        if attack.is_iterated:
            index = batch.index_N.to(x.device)[left]
            broken = iterated.break_images(surface, x, label, index, attack, seed=self.plan.seed, ball=ball)
        else:
            seed = int(draw_keys(self.plan.seed, attack.kind, shard)) % 2**31
            broken = autoattack.break_images(surface, x, label, attack, seed=seed, ball=ball)
        return torch.zeros_like(robust).index_put((left,), broken), ball.outside

    def _surface(self, unit: Unit) -> Surface:
        cell = self.plan.cells[unit[0]]
        if cell.lam is not None:
            return self.surfaces.fixed(cell.lam, cell.via)
        key = draw_keys(self.plan.seed, "random lambda", *unit)
        return self.surfaces.random(self.plan.lambdas, self.plan.random_draws, key)


def _share(which: Tensor) -> float:
    return int(which.sum()) / len(which)
