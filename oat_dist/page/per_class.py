"""SA and RA of every class at every lambda, from what became of every image.

A measurement leaves that beside its report (`oat_dist.evaluation.summary.write_images`). Where it did not, as those of
older versions, some of the images are measured again.

Letters: M images, K classes, L lambdas.
"""

import dataclasses
import pathlib

import torch
from torch import Tensor

from oat_dist.data import evaluation_batches
from oat_dist.distributed import World
from oat_dist.evaluation import EvaluationAttack, Plan, run_plan
from oat_dist.evaluation.loop import CLEAN, ROBUST
from oat_dist.page.finished import FinishedRun, Images
from oat_dist.weights import read_tensors

MEASURED_AGAIN = 50
"""Images, evenly spread, that are measured where no outcomes were kept."""


def per_class(run: FinishedRun, images: Images, device: torch.device) -> dict:
    """Accuracies of every class at the lambdas of a run's curve.

    Args:
        run: The run.
        images: The images it was measured on.
        device: Where to compute, if need be.

    Returns:
        {"num_examples", "again": whether they were measured for this, "counts" [K], "sa" [L][K], "ra" [L][K]};
        an accuracy is None for a class without images.
    """
    outcomes = [_kept(path, point["lam"]) for point, path in run.curve]
    is_kept = None not in outcomes
    if not is_kept:
        outcomes = _measured(run, device)
    row = {int(index): at for at, index in enumerate(images.index)}
    num_classes, sa, ra = len(run.data.classes), [], []
    for index_M, code_M in outcomes:
        label_M = images.label[[row[int(index)] for index in index_M]]
        counts = label_M.bincount(minlength=num_classes)
        sa.append(_shares(label_M[code_M != CLEAN], counts))
        ra.append(_shares(label_M[code_M == ROBUST], counts))
    return {"num_examples": len(index_M), "again": not is_kept, "counts": counts.tolist(), "sa": sa, "ra": ra}


def _kept(report: pathlib.Path, lam: float) -> tuple[Tensor, Tensor] | None:
    """Index and code of every image at a lambda, or None where they were not kept."""
    path = report.with_suffix(".images.safetensors")
    if not path.is_file():
        return None
    tensors, about = read_tensors(path)
    return tensors["index"], tensors["code"][about["cells"].index({"lam": lam, "via": None})]


def _measured(run: FinishedRun, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Index and code of some images at every lambda of the curve."""
    lambdas = tuple(point["lam"] for point, _ in run.curve)
    cfg = dataclasses.replace(run.config.data, loader="memory")
    size = run.config.evaluation.batch_size
    split = run.frontier["split"]
    batches = evaluation_batches(run.data, split, cfg, size, device=device, num_images=MEASURED_AGAIN)
    plan = Plan(lambdas=lambdas, attack=EvaluationAttack.of(run.config), seed=run.config.seed)
    outcome = run_plan(run.network.to(device), batches, plan, world=World(device=device))
    return [(outcome.index_M, outcome.of(lam)) for lam in lambdas]


def _shares(label: Tensor, counts: Tensor) -> list[float | None]:
    right = label.bincount(minlength=len(counts)).tolist()
    return [right[at] / count if count else None for at, count in enumerate(counts.tolist())]
