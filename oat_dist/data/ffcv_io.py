"""Writing and reading FFCV .beton files. The only file that imports ffcv.

FFCV reads; order and augmentation are ours (FFCV's own random transforms draw from thread-local generators that no seed
reaches). Images are fixed-size uint8 arrays (NDArrayField), so any number of channels is stored bit by bit.

Facts about FFCV 1.0.2 that this file lives with: importing it, making a loader and starting an epoch each change
torch's number of threads, the last one again from a background thread; `drop_last` is on by default; an order must be
one of FFCV's names unless `traversal_order` is set afterwards; on a CPU the memory of a batch is used again by later
batches.
"""

import contextlib
import errno
import importlib.util
import multiprocessing
import os
import pathlib
import queue
import types
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from oat_dist.errors import UserError

# The smallest page FFCV allows: a small data set then takes megabytes, not tens of them.
_MIN_PAGE_BYTES = 1 << 21
# An image does not cross pages; with eight or more in each, at most an eighth of the file is filling.
_MIN_IMAGES_PER_PAGE = 8


def is_installed() -> bool:
    """Whether the ffcv package is there (it is not imported)."""
    return importlib.util.find_spec("ffcv") is not None


def write_beton(path: pathlib.Path, *, image: np.ndarray, label: np.ndarray, index: np.ndarray) -> None:
    """Write images [N, H, W, C] uint8 with label and index [N] int64; the same input gives the same bytes.

    FFCV's own `from_indexed_dataset` starts processes and waits for ever when one dies (of a full disk, say), so its
    parts are called here one after the other, in this process (which is also faster for small images). These parts are
    no public interface: pyproject.toml pins FFCV to the one version they are tested with.

    Raises:
        OSError: The file cannot be written.
    """
    with _same_threads():
        from ffcv.fields import IntField, NDArrayField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.types import ALLOC_TABLE_TYPE
        from ffcv.writer import DatasetWriter, worker_job_indexed_dataset

    fields = {"image": NDArrayField(image.dtype, image.shape[1:]), "label": IntField(), "index": IntField()}
    page_bytes = max(_MIN_PAGE_BYTES, 1 << (_MIN_IMAGES_PER_PAGE * image[0].nbytes - 1).bit_length())
    writer = DatasetWriter(str(path), fields, page_size=page_bytes)
    writer.num_samples = len(label)
    writer.prepare()
    # Nobody shares it, and nothing is left in /dev/shm when writing fails.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    writer.metadata_sm = types.SimpleNamespace(buf=bytearray(len(label) * writer.metadata_type.itemsize))
    work, allocations = queue.SimpleQueue(), queue.SimpleQueue()
    work.put([(row, row) for row in range(len(label))])
    work.put(None)
    allocator = MemoryAllocator(str(path), writer.data_region_start, page_bytes)
    worker_job_indexed_dataset(
        work, writer.metadata_sm, writer.metadata_type, fields, allocator, multiprocessing.Value("Q", 0), allocations,
        _Samples(image, label, index),
    )  # fmt: skip
    table = allocations.get()
    writer.finalize(table)
    # FFCV writes pages unbuffered and does not look at how many bytes went through.
    pages_end = allocator.offset + allocator.next_page_written.value * page_bytes
    if path.stat().st_size != pages_end + len(table) * ALLOC_TABLE_TYPE.itemsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class BetonReader:
    """Batches of a .beton file in any order."""

    def __init__(self, path: pathlib.Path, *, workers: int) -> None:
        """Open a file.

        Args:
            path: File written by `write_beton`.
            workers: Decoding threads.

        Raises:
            UserError: FFCV is not installed.
        """
        if not is_installed():
            raise UserError(
                "data.loader='ffcv': FFCV is not installed; run `make setup` or `pip install -e .[ffcv]` (it builds "
                "against libopencv-dev, libturbojpeg0-dev and pkg-config), or set data.loader=memory"
            )
        with _same_threads():
            from ffcv.fields.basics import IntDecoder
            from ffcv.fields.decoders import NDArrayDecoder
            from ffcv.loader import Loader, OrderOption
            from ffcv.transforms import ToTensor

            self._loader = Loader(
                str(path),
                batch_size=1,
                num_workers=workers,
                order=OrderOption.SEQUENTIAL,
                drop_last=False,
                pipelines={
                    "image": [NDArrayDecoder(), ToTensor()],
                    "label": [IntDecoder(), ToTensor()],
                    "index": [IntDecoder(), ToTensor()],
                },
            )

    def __len__(self) -> int:
        """Number of images."""
        return int(self._loader.reader.num_samples)

    def batches(self, row_M: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Read rows of the file in order.

        Args:
            row_M: [M] int64 rows.
            batch_size: Rows per batch; the last batch has the rest.

        Yields:
            image [N, H, W, C] uint8, label [N] and index [N] int64, on the host, owned by the caller.
        """
        if len(row_M) == 0:
            return
        order = row_M.numpy().astype(np.uint64)
        self._loader.batch_size = batch_size
        self._loader.traversal_order = _GivenOrder(order)
        self._loader.first_traversal_order = order
        threads = torch.get_num_threads()
        with _same_threads():
            batches = iter(self._loader)
        for image, label, index in batches:
            # The reading thread, too, set the number of threads, at some time before its first batch.
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            yield image.clone(), label[:, 0].clone(), index[:, 0].clone()


class _Samples:
    """Rows as FFCV's writer wants them."""

    def __init__(self, image: np.ndarray, label: np.ndarray, index: np.ndarray) -> None:
        self.image, self.label, self.index = image, label, index

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int, int]:
        return self.image[row], int(self.label[row]), int(self.index[row])


class _GivenOrder:
    """An FFCV traversal order that is simply given."""

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def sample_order(self, epoch: int) -> np.ndarray:
        """The given rows, whatever the epoch."""
        return self.order


@contextlib.contextmanager
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
