"""Batches: which image is where in which rank's batch, and the way from stored bytes to augmented pixels.

The order of an epoch is a keyed permutation, cut into global batches. Position p of a global batch belongs to
micro-batch p mod A of rank (p div A) mod R, with A accumulation steps and R ranks. So the images of micro-batch m are
the same on any number of ranks, and every property that follows the position (lambda = 0, see
`conditioning.LambdaSampler`) is spread evenly. Both readers feed the same code, so their batches are equal bit by bit.

Letters: N images of a batch, M images of a pass.
"""

import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import safetensors.torch
import torch
from torch import Tensor

from oat_dist.config import Config, DataConfig
from oat_dist.data.augment import augment
from oat_dist.data.ffcv_io import BetonReader
from oat_dist.data.prepared import PreparedData
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
    """int64 dataset indices, on the host."""
    position_N: Tensor
    """int64 positions within the global batch, on the host."""


class Reader(Protocol):
    """Reads rows of one split in a given order."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(self, row_M: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield image [N, H, W, C] uint8, label [N] and index [N] int64 (index on the host)."""


class MemoryReader:
    """The whole split on the device."""

    def __init__(self, path: pathlib.Path, device: torch.device) -> None:
        """Load a .safetensors split."""
        tensors = safetensors.torch.load_file(path)
        self.image, self.label = tensors["image"].to(device), tensors["label"].to(device)
        self.index = tensors["index"]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index)

    def batches(self, row_M: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Select rows; see `Reader`."""
        for row_N in row_M.split(batch_size):
            on_device = row_N.to(self.image.device, non_blocking=True)
            yield self.image[on_device], self.label[on_device], self.index[row_N]


def open_reader(data: PreparedData, split: str, cfg: DataConfig, device: torch.device) -> Reader:
    """The reader that `data.loader` names, for one split."""
    path = data.file(split, cfg.loader)
    return BetonReader(path, workers=cfg.workers) if cfg.loader == "ffcv" else MemoryReader(path, device)


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
            config: Configuration of the run.
            rank: This rank.
            ranks: Number of ranks.
            device: Where batches go.

        Raises:
            UserError: A batch is larger than the split, or too small to give every rank an image.
        """
        optim, accumulation = config.optim, config.engine.accumulation
        num_images = data.counts["train"]
        if optim.batch_size > num_images:
            expected = f"at most the {num_images} training images of {data.name}"
            raise UserError(f"optim.batch_size={optim.batch_size}: must be {expected}")
        if optim.batch_size < ranks * accumulation:
            expected = (
                f"at least ranks x engine.accumulation = {ranks} x {accumulation}, so that every rank has an image"
            )
            raise UserError(f"optim.batch_size={optim.batch_size}: must be {expected}")
        self.config, self.device = config, device
        self.steps_per_epoch = num_images // optim.batch_size
        self._reader = open_reader(data, "train", config.data, device)
        cfg = config.data
        self._augmentation = {
            "shift_pixels": data.shift_pixels if cfg.shift_pixels is None else cfg.shift_pixels,
            "flip": data.flip if cfg.flip is None else cfg.flip,
        }
        self._positions = deal(optim.batch_size, rank=rank, ranks=ranks, accumulation=accumulation)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """One pass over the training split.

        Args:
            epoch: Epoch, from 0.
            first_step: Step within the epoch to begin with; the batches before are not read.

        Yields:
            The micro-batches of this rank for one optimiser step. The incomplete last global batch is left out; which
            images that are changes from epoch to epoch.
        """
        seed, size = self.config.seed, self.config.optim.batch_size
        order = permutation(len(self._reader), seed, "order", epoch)[: self.steps_per_epoch * size]
        mine = torch.cat(self._positions)
        row_M = order.view(self.steps_per_epoch, size)[first_step:, mine].flatten()
        for image, label, index_N in self._reader.batches(row_M, len(mine)):
            x, label_N = _to_device(image, label, self.device)
            on_device = index_N.to(self.device, non_blocking=True)
            x = augment(x, on_device, seed=seed, epoch=epoch, **self._augmentation)
            sizes = [len(p) for p in self._positions]
            parts = zip(
                _to_pixels(x).split(sizes), label_N.split(sizes), index_N.split(sizes), self._positions, strict=True
            )
            yield [Batch(image_NCHW=x, label_N=y, index_N=i, position_N=p) for x, y, i, p in parts]


def evaluation_batches(
    data: PreparedData,
    split: str,
    cfg: DataConfig,
    batch_size: int,
    *,
    device: torch.device,
    num_images: int | None = None,
) -> list[Batch]:
    """The first images of a split (default: all), unaugmented, as batches that stay on the device for all lambdas."""
    row_M = torch.arange(data.counts[split])[:num_images]
    batches = []
    for image, label, index_N in open_reader(data, split, cfg, device).batches(row_M, batch_size):
        x, label_N = _to_device(image, label, device)
        batches.append(Batch(image_NCHW=_to_pixels(x), label_N=label_N, index_N=index_N, position_N=index_N))
    return batches


def _to_device(image: Tensor, label: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images as [N, C, H, W] view of channels-last memory, and labels."""
    if device.type == "cuda" and image.device.type == "cpu":
        image, label = image.pin_memory(), label.pin_memory()
    return image.to(device, non_blocking=True).permute(0, 3, 1, 2), label.to(device, non_blocking=True)


def _to_pixels(x_NCHW: Tensor) -> Tensor:
    return x_NCHW.to(torch.float32) / 255
