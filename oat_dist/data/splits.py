"""Writing one split of a data set in every format that this machine can write; images may lie in a mapped file."""

import json
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from oat_dist.data import ffcv_io
from oat_dist.data.checksum import file_sha256
from oat_dist.data.prepared import SUFFIXES
from oat_dist.errors import UserError


def check_space(num_images: int, image_shape: Sequence[int], folder: pathlib.Path, *, copies: int = 0) -> None:
    """Say before anything is written that the disk is too full.

    Args:
        num_images: Images to be written in every format of this machine.
        image_shape: (H, W, C), one byte each.
        folder: Folder within that of data sets.
        copies: How often they are written besides.

    Raises:
        UserError: There is too little room.
    """
    needed = num_images * math.prod(image_shape) * (1 + ffcv_io.is_installed() + copies)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder.parent}: the data set takes {needed >> 20} MiB, but {free >> 20} MiB are free there")


def write_split(
    folder: pathlib.Path, split: str, image: np.ndarray, label: np.ndarray, index: np.ndarray
) -> dict[str, str]:
    """Write a split in every format of this machine.

    Args:
        folder: Where to.
        split: Name of the split.
        image: [N, H, W, C] uint8; it may be a file mapped into memory.
        label: [N] int64.
        index: [N] int64, place in the source.

    Returns:
        File name -> checksum.
    """
    tensors = {"image": np.ascontiguousarray(image), "label": label, "index": index}
    written = [folder / f"{split}{SUFFIXES['memory']}"]
    _write_safetensors(written[0], tensors)
    if ffcv_io.is_installed():
        written.append(folder / f"{split}{SUFFIXES['ffcv']}")
        ffcv_io.write_beton(written[1], **tensors)
    return {path.name: file_sha256(path) for path in written}


def _write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """The bytes of `safetensors.numpy.save`, which would hold them all in memory."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = {}, 0
    for name in order:
        array, start = tensors[name], end
        end += array.nbytes
        dtype = {"uint8": "U8", "int64": "I64"}[str(array.dtype)]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for first in range(0, len(tensors[name]), 1000):
                stream.write(tensors[name][first : first + 1000].data)
