"""Two sets of networks compared image by image: what each got right on the same images, and the paired bootstrap.

An image that is hard for one network is hard for the other, so the interval of the difference is narrower than the
intervals of both accuracies say. Seeds are pooled: an image counts by the share of a set's networks that got it right.
The interval is over images alone; what other seeds would give is not in it.

Letters: M images.
"""

import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

from oat_dist.data import PreparedData
from oat_dist.dedicated import find_report
from oat_dist.errors import UserError
from oat_dist.evaluation import EvaluationAttack
from oat_dist.evaluation.intervals import intervals
from oat_dist.evaluation.loop import CLEAN, ROBUST
from oat_dist.weights import read_tensors

Right = dict[tuple[str, float], Tensor]
"""("sa" or "ra", lambda) -> [M] bool, in the order of the dataset's indices."""


def right_images(
    run: pathlib.Path, lambdas: Sequence[float], attack: EvaluationAttack, data: PreparedData, split: str
) -> Right:
    """Which images a run got right, from its report.

    Args:
        run: Folder of a finished run that was measured so.
        lambdas: Where on the curve.
        attack: The attack.
        data: The data set.
        split: Split of it.

    Raises:
        UserError: The outcomes of single images are not there.
    """
    report = find_report(run, lambdas, attack, data, split)
    assert report is not None, f"{run}: not measured on {split}"
    path = report.with_name(f"{report.stem}.images.safetensors")
    if not path.is_file():
        raise UserError(f"{report}: lacks {path.name} beside it; remove the report, and the images are measured again")
    tensors, about = read_tensors(path)
    order_M, found = tensors["index"].argsort(), {}
    for cell, code_M in zip(about["cells"], tensors["code"][:, order_M], strict=True):
        if cell["via"] is None:
            found["sa", cell["lam"]], found["ra", cell["lam"]] = code_M != CLEAN, code_M == ROBUST
    return found


def difference(
    ours: Sequence[Right], theirs: Sequence[Right], key: tuple[str, float], *, seed: int = 0
) -> tuple[float, float, float]:
    """How much more often ours are right than theirs, and the 95% interval of the paired bootstrap over images.

    Args:
        ours: One per network, on the same images.
        theirs: The same of the others; they may be more or fewer.
        key: Accuracy and lambda.
        seed: Seed of the resampling.

    Returns:
        (difference, low, high) as fractions in [-1, 1].
    """
    share_M, other_M = (torch.stack([right[key] for right in side]).double().mean(0) for side in (ours, theirs))
    more_M = share_M - other_M
    ((low, high),) = intervals(more_M[:, None], seed=seed)
    return float(more_M.mean()), low, high
