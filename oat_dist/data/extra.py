"""Images of a second data set in every batch (`data.extra`): which positions they take, and in which order they come.

The positions are drawn once for a run, so that every rank and micro-batch has the same number of them at every step,
whatever the lambdas of the positions. The images form an endless stream, one keyed permutation of the training split
after the other; where a run is in it follows from its step, so it does not depend on ranks, workers or a resume.

Letters: B images of a global batch, T steps, E extra images.
"""

import torch
from torch import Tensor

from oat_dist.config import DataConfig
from oat_dist.data.prepared import PreparedData, open_prepared
from oat_dist.errors import UserError
from oat_dist.random import permutation

EXTRA_INDEX = 1 << 32
"""Dataset indices of extra images begin here, above those of any data set."""


def open_extra(data: PreparedData, cfg: DataConfig) -> PreparedData | None:
    """The data set that `data.extra` names, or None when it names none.

    Args:
        data: The data set of the run, `data.dataset`.
        cfg: Where data sets are, and the name of this one.

    Raises:
        UserError: It is not there, or has other classes or images of another shape.
    """
    if cfg.extra is None:
        return None
    extra = open_prepared(cfg.root, cfg.extra, key="data.extra")
    if extra.image_shape != data.image_shape:
        theirs, ours = ("x".join(map(str, shape)) for shape in (extra.image_shape, data.image_shape))
        raise UserError(f"data.extra={cfg.extra!r}: its images are {theirs}, must be {ours} as those of {data.name}")
    if extra.classes != data.classes:
        theirs, ours = (f"{len(names)} ({_brief(names)})" for names in (extra.classes, data.classes))
        raise UserError(f"data.extra={cfg.extra!r}: its classes are {theirs}, must be the {ours} of {data.name}")
    return extra


def extra_positions(num_extra: int, batch_size: int, seed: int) -> Tensor:
    """[B] bool: which positions of every global batch hold extra images, `num_extra` of them."""
    is_extra_B = torch.zeros(batch_size, dtype=torch.bool)
    is_extra_B[permutation(batch_size, seed, "extra positions")[:num_extra]] = True
    return is_extra_B


def extra_rows(num_images: int, seed: int, *, step: int, num_steps: int, per_step: int) -> tuple[Tensor, Tensor]:
    """The part of the stream that some steps read: place q holds permutation(n, seed, "extra order", q // n)[q % n].

    Args:
        num_images: n, images of the training split of the extra data set.
        seed: Seed of the run.
        step: First step, counted over the run.
        num_steps: T.
        per_step: E, extra images of a global batch.

    Returns:
        row_TE: int64 rows of the training split.
        offset_TE: int64, to be added to dataset indices. It differs from pass to pass, so that an image that comes
            again within an epoch has other draws.
    """
    place_TE = (step * per_step + torch.arange(num_steps * per_step)).view(num_steps, per_step)
    pass_TE = place_TE // num_images
    numbers, of_place = torch.unique(pass_TE, return_inverse=True)
    order = torch.stack([permutation(num_images, seed, "extra order", number) for number in numbers.tolist()])
    return order[of_place, place_TE % num_images], EXTRA_INDEX * (1 + pass_TE)


def _brief(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
