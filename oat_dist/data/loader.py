"""Batches: which image is where in which rank's batch, and the way from stored bytes to augmented pixels.

The order of an epoch is a keyed permutation, cut into global batches. Position p of a global batch belongs to
micro-batch p mod A of rank (p div A) mod R, with A accumulation steps and R ranks. So the images of micro-batch m are
the same on any number of ranks, and every property that follows the position (lambda = 0, see
`conditioning.LambdaSampler`) is spread evenly. Both readers feed the same code, so their batches are equal bit by bit.
With `data.extra`, some positions hold images of a second data set (see `extra.py`).

Letters: N images of a batch, M images of a pass, T steps, H, W, C.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from oat_dist.config import Config, DataConfig
from oat_dist.data.augment import augment, cutout
from oat_dist.data.extra import EXTRA_INDEX, extra_positions, extra_rows, open_extra
from oat_dist.data.prepared import PreparedData
from oat_dist.data.reader import open_reader, read_steps, to_device
from oat_dist.errors import UserError
from oat_dist.random import permutation


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one micro-batch of one rank."""

    image_NCHW: Tensor
    """float32 in [0, 1], channels last in memory, on the device."""
    label_N: Tensor
    """int64, on the device."""
    index_N: Tensor
    """int64 dataset indices, on the host; those of extra images begin at `EXTRA_INDEX`."""
    position_N: Tensor
    """int64 positions within the global batch, on the host."""

    @property
    def is_extra_N(self) -> Tensor:  # noqa: N802 - a shape suffix, as everywhere
        """Bool, on the host: which images are of `data.extra`."""
        return self.index_N >= EXTRA_INDEX


def deal(batch_size: int, *, rank: int, ranks: int, accumulation: int) -> list[Tensor]:
    """Positions of a global batch that each micro-batch of a rank gets, increasing.

    Args:
        batch_size: Images of the global batch.
        rank: This rank.
        ranks: Number of ranks.
        accumulation: Micro-batches per step.

    Returns:
        One int64 tensor per micro-batch; sizes differ by at most one over all ranks and micro-batches.
    """
    position = torch.arange(batch_size)
    mine = (position // accumulation) % ranks == rank
    return [position[mine & (position % accumulation == micro)] for micro in range(accumulation)]


class TrainLoader:
    """Augmented micro-batches of one rank."""

    def __init__(self, data: PreparedData, config: Config, *, rank: int, ranks: int, device: torch.device) -> None:
        """Open the training split.

        Args:
            data: The data set.
            config: Configuration of the run; with `data.extra`, that data set is opened too.
            rank: This rank.
            ranks: Number of ranks.
            device: Where batches go.

        Raises:
            UserError: A batch is larger than the split, or too small to give every rank an image; or the extra data
                set is not there or does not go with this one.
        """
        optim, accumulation = config.optim, config.engine.accumulation
        num_images, num_extra = data.counts["train"], config.num_extra
        if optim.batch_size - num_extra > num_images:
            expected = f"at most the {num_images} training images of {data.name}"
            expected += f" and {num_extra} of data.extra" if num_extra else ""
            raise UserError(f"optim.batch_size={optim.batch_size}: must be {expected}")
        if optim.batch_size < ranks * accumulation:
            expected = (
                f"at least ranks x engine.accumulation = {ranks} x {accumulation}, so that every rank has an image"
            )
            raise UserError(f"optim.batch_size={optim.batch_size}: must be {expected}")
        self.config, self.device = config, device
        self.steps_per_epoch = config.steps_per_epoch(num_images)
        extra = open_extra(data, config.data)
        self._reader = open_reader(data, "train", config.data, device)
        self._extra_reader = open_reader(extra, "train", config.data, device) if extra else None
        cfg = config.data
        self._augmentation = {
            "shift_pixels": data.shift_pixels if cfg.shift_pixels is None else cfg.shift_pixels,
            "flip": data.flip if cfg.flip is None else cfg.flip,
        }
        self._cutout_pixels = cfg.cutout_pixels
        self._fill_C = torch.tensor(data.pixel_mean, dtype=torch.float32, device=device)
        self._positions = deal(optim.batch_size, rank=rank, ranks=ranks, accumulation=accumulation)
        is_extra_B, mine = extra_positions(num_extra, optim.batch_size, config.seed), torch.cat(self._positions)
        is_extra_N = is_extra_B[mine]
        # Of the images of either kind in a global batch, those of this rank.
        self._main_columns = (~is_extra_B).cumsum(0)[mine[~is_extra_N]] - 1
        self._extra_columns = is_extra_B.cumsum(0)[mine[is_extra_N]] - 1
        # Where each image is when all main ones come first.
        self._place_N = torch.argsort(torch.argsort(is_extra_N.byte(), stable=True))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """One pass over the training split.

        Args:
            epoch: Epoch, from 0.
            first_step: Step within the epoch to begin with; the batches before are not read.

        Yields:
            The micro-batches of this rank for one optimiser step. The incomplete last global batch is left out; which
            images that are changes from epoch to epoch.
        """
        seed, num_steps = self.config.seed, self.steps_per_epoch - first_step
        size = self.config.optim.batch_size - self.config.num_extra
        order = permutation(len(self._reader), seed, "order", epoch)[: self.steps_per_epoch * size]
        row_TM = order.view(self.steps_per_epoch, size)[first_step:, self._main_columns]
        parts = [read_steps(self._reader, row_TM, self.device)]
        if self._extra_reader is not None:
            parts.append(self._read_extra(epoch * self.steps_per_epoch + first_step, num_steps))
        sizes, place_on_device = [len(p) for p in self._positions], self._place_N.to(self.device)
        for of_step in zip(*parts, strict=True):
            x, label_N, index_N = _joined([part for part in of_step if part], self._place_N, place_on_device)
            on_device = index_N.to(self.device, non_blocking=True)
            x = augment(x.permute(0, 3, 1, 2), on_device, seed=seed, epoch=epoch, **self._augmentation)
            x = cutout(
                _to_pixels(x), on_device, seed=seed, epoch=epoch, pixels=self._cutout_pixels, fill_C=self._fill_C
            )
            micro_batches = zip(
                x.split(sizes), label_N.split(sizes), index_N.split(sizes), self._positions, strict=True
            )
            yield [Batch(image_NCHW=x, label_N=y, index_N=i, position_N=p) for x, y, i, p in micro_batches]

    def _read_extra(self, step: int, num_steps: int) -> Iterator[tuple[Tensor, ...]]:
        """As `read_steps`, the extra images of this rank from a step of the run on."""
        row_TE, offset_TE = extra_rows(
            len(self._extra_reader), self.config.seed, step=step, num_steps=num_steps, per_step=self.config.num_extra
        )
        read = read_steps(self._extra_reader, row_TE[:, self._extra_columns], self.device)
        for part, offset_E in zip(read, offset_TE[:, self._extra_columns], strict=True):
            yield (*part[:2], part[2] + offset_E) if part else part


def evaluation_batches(
    data: PreparedData,
    split: str,
    cfg: DataConfig,
    batch_size: int,
    *,
    device: torch.device,
    num_images: int | None = None,
) -> list[Batch]:
    """The images of a split, unaugmented, as batches that stay on the device for all lambdas.

    With `num_images`, at most the split's, only so many: spread evenly, since a split may lie in the order of classes.
    """
    reader, batches = open_reader(data, split, cfg, device), []
    count = len(reader)
    num_images = min(num_images or count, count)
    row_M = torch.arange(num_images) * count // num_images
    for image, label, index_N in reader.batches(row_M, batch_size):
        x, label_N = to_device(image, label, device)
        x = x.permute(0, 3, 1, 2)
        batches.append(Batch(image_NCHW=_to_pixels(x), label_N=label_N, index_N=index_N, position_N=index_N))
    return batches


def _joined(parts: list[tuple[Tensor, ...]], place_N: Tensor, place_on_device: Tensor) -> tuple[Tensor, ...]:
    """Image, label and index of a rank's images in the order of its positions."""
    if len(parts) == 1:
        return parts[0]
    x, label, index = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return x[place_on_device], label[place_on_device], index[place_N]


def _to_pixels(x_NCHW: Tensor) -> Tensor:
    return x_NCHW.to(torch.float32) / 255
