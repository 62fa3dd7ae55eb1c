"""What a report says of an outcome: accuracies with intervals, and what became of every image.

Letters: M images, C cells.
"""

import pathlib
from collections.abc import Iterable

import torch
from torch import Tensor

from oat_dist.evaluation.intervals import LEVEL, RESAMPLES, intervals
from oat_dist.evaluation.loop import CLEAN, ROBUST, Outcome, Plan
from oat_dist.evaluation.specs import EvaluationAttack
from oat_dist.weights import write_tensors


def summary(outcome: Outcome) -> dict:
    """The part of a report that an outcome gives.

    Args:
        outcome: From `run_plan`.

    Returns:
        "points": {"lam", "sa", "ra", "sa_ci", "ra_ci"} per lambda, with several attacks "ra_after" (attack -> RA after
        it and all before it) and "ra_after_ci", with attack lambdas "ra_worst" and "ra_worst_ci" (against the best
        choice of lambda for every image); "confidence"; perhaps "matrix" and "random_lambda". Accuracies are fractions
        in [0, 1].
    """
    plan = outcome.plan
    kept: dict[tuple, Tensor] = {}
    for lam in (*plan.lambdas, *([None] if plan.random_draws else [])):
        kept[lam, "sa"], kept[lam, "ra"] = outcome.of(lam) != CLEAN, outcome.of(lam) == ROBUST
        if lam is not None and plan.attack_lambdas:
            kept[lam, "ra_worst"] = kept[lam, "ra"] & _robust_through_all(outcome, lam)
    # Quantities of their own, resampled together with the rest.
    after = {(lam, part.name): _robust_after(outcome, lam, at) for lam in plan.lambdas for at, part in _numbered(plan)}
    cells = {(via, lam): outcome.of(lam, via) == ROBUST for via in plan.attack_lambdas for lam in plan.lambdas}
    columns = [*kept.values(), *after.values(), *cells.values()]
    found = iter(intervals(torch.stack(columns, 1), seed=plan.seed))
    kept_ci, after_ci, cell_ci = ({key: list(next(found)) for key in part} for part in (kept, after, cells))

    def accuracies(lam: float | None) -> dict:
        names = [name for at, name in kept if at == lam]
        values = {name: _mean(kept[lam, name]) for name in names}
        return values | {f"{name}_ci": kept_ci[lam, name] for name in names}

    points = [{"lam": lam, **accuracies(lam)} for lam in plan.lambdas]
    for point in points if len(plan.attack.parts) > 1 else []:
        names = [name for lam, name in after if lam == point["lam"]]
        point["ra_after"] = {name: _mean(after[point["lam"], name]) for name in names}
        point["ra_after_ci"] = {name: after_ci[point["lam"], name] for name in names}
    confidence = {"level": LEVEL, "method": "percentile bootstrap over images", "resamples": RESAMPLES}
    report = {"points": points, "confidence": confidence}
    if plan.attack_lambdas:
        report["matrix"] = {"attack_lambdas": list(plan.attack_lambdas), "lambdas": list(plan.lambdas)}
        for key, values in (("ra", {at: _mean(right) for at, right in cells.items()}), ("ra_ci", cell_ci)):
            report["matrix"][key] = [[values[via, lam] for lam in plan.lambdas] for via in plan.attack_lambdas]
    if plan.random_draws:
        report["random_lambda"] = {"lambdas": list(plan.lambdas), "draws": plan.random_draws, **accuracies(None)}
    return report


def write_images(outcome: Outcome, path: pathlib.Path) -> None:
    """Write what became of every image: `index` [M], and `code` [C, M] as `Outcome` has it; cells are in the header.

    Args:
        outcome: From `run_plan`.
        path: A .safetensors file.
    """
    cells = [{"lam": cell.lam, "via": cell.via} for cell in outcome.plan.cells]
    codes = {"robust": ROBUST, "clean": CLEAN}
    codes |= {part.name: at for at, part in enumerate(outcome.plan.attack.parts, start=1)}
    tensors = {"index": outcome.index_M.to(torch.int32), "code": outcome.code_CM}
    write_tensors(tensors, path, {"cells": cells, "codes": codes})


def _robust_through_all(outcome: Outcome, lam: float) -> Tensor:
    """[M] bool: withstands the attack through every lambda the attacker may choose."""
    return torch.stack([outcome.of(lam, via) == ROBUST for via in outcome.plan.attack_lambdas]).all(0)


def _numbered(plan: Plan) -> Iterable[tuple[int, EvaluationAttack]]:
    return enumerate(plan.attack.parts, start=1)


def _robust_after(outcome: Outcome, lam: float, at: int) -> Tensor:
    """[M] bool: withstands attack number `at` and all before it."""
    code = outcome.of(lam)
    return (code == ROBUST) | (code > at)


def _mean(which: Tensor) -> float:
    return int(which.sum()) / len(which)
