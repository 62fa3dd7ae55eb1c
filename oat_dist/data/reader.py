"""Reading stored images in any order: from a .beton file, or from a whole split on the device.

Letters: M images of a pass or a step, N images of a batch, T steps, H, W, C.
"""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Protocol

import safetensors.torch
import torch
from torch import Tensor

from oat_dist.config import DataConfig
from oat_dist.data.ffcv_io import BetonReader
from oat_dist.data.prepared import PreparedData


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


def read_steps(reader: Reader, row_TM: Tensor, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Read the same number of images at every step.

    Args:
        reader: The split.
        row_TM: int64 rows of each step.
        device: Where images go.

    Yields:
        Per step image [M, H, W, C] uint8 and label [M] on the device and index [M] on the host; () if there are none.
    """
    if row_TM.shape[1] == 0:
        yield from itertools.repeat((), len(row_TM))
        return
    for image, label, index_M in reader.batches(row_TM.flatten(), row_TM.shape[1]):
        yield (*to_device(image, label, device), index_M)


def to_device(image: Tensor, label: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [N, H, W, C] uint8 and labels [N] on the device; the host does not wait for them."""
    if device.type == "cuda" and image.device.type == "cpu":
        image, label = image.pin_memory(), label.pin_memory()
    return image.to(device, non_blocking=True), label.to(device, non_blocking=True)
