"""Images without labels, a chunk at a time: the unlabelled part of STL-10, any folder of images, or an .npz.

Nothing here holds more than a chunk in memory. Chunks come in the order of the source and in the shape that a network
takes; images of another size are cropped and resized when asked, as `folder.py` does it.

Letters: N images of a chunk, H, W, C.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from oat_dist.data.archives import open_member
from oat_dist.data.checksum import file_sha256
from oat_dist.data.download import obtain
from oat_dist.data.sources import stl10
from oat_dist.data.sources.folder import SUFFIXES, crop_and_resize, decode_image
from oat_dist.data.sources.npz import open_images
from oat_dist.data.sources.source import SourceOptions
from oat_dist.errors import UserError

NAMES = ("stl10-unlabeled", "folder:PATH", "npz:FILE")
"""What `--images` takes."""

_STL10_MEMBER = "stl10_binary/unlabeled_X.bin"
_NUM_STL10 = 100_000


@dataclass(frozen=True, kw_only=True)
class Unlabelled:
    """Images of a source."""

    count: int
    """How many there are, or are asked for."""
    chunks: Iterator[np.ndarray]
    """uint8 [N, H, W, C] each, to be read once."""
    citation: str
    """Where they come from."""
    sha256: Callable[[], Mapping[str, str]]
    """Source file -> checksum, known when all chunks were read."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a source."""

    image_shape: tuple[int, int, int]
    """(H, W, C) that the network takes."""
    chunk_size: int
    """Images per chunk; the last has the rest."""
    limit: int | None = None
    """Most images, the first ones; None: all."""

    def count(self, available: int) -> int:
        """How many of the available images are taken."""
        return available if self.limit is None else min(available, self.limit)


@contextlib.contextmanager
def open_unlabelled(request: str, wanted: Wanted, options: SourceOptions) -> Iterator[Unlabelled]:
    """Open a source for the time of a block.

    Args:
        request: One of `NAMES`, with a path in place of PATH or FILE.
        wanted: Shape, number and grouping of the images.
        options: `archive` and `cache` of STL-10; `size`, which must be that of the network.

    Raises:
        UserError: Unknown source, options that it does not take, images that cannot be read or have another shape.
    """
    name, colon, path = request.partition(":")
    opener = {"stl10-unlabeled": _open_stl10, "folder": _open_folder, "npz": _open_npz}.get(name)
    takes_path = name != "stl10-unlabeled"
    if opener is None or not takes_path == bool(colon) == bool(path):
        raise UserError(f"--images {request}: expected one of {', '.join(NAMES)}")
    if options.archive is not None and takes_path:
        raise UserError(f"--source={options.archive}: --images {request} does not take it; stl10-unlabeled does")
    height, width, _ = wanted.image_shape
    if options.size is not None and (options.size, options.size) != (height, width):
        raise UserError(f"--size={options.size}: must be that of the network's training images, {width}x{height}")
    with opener(pathlib.Path(path), wanted, options) as images:
        yield images


@contextlib.contextmanager
def _open_stl10(_: pathlib.Path, wanted: Wanted, options: SourceOptions) -> Iterator[Unlabelled]:
    """The 100,000 unlabelled images of 96x96 pixels."""
    _require_shape((96, 96, 3), wanted, options, f"--images {NAMES[0]}")
    path = obtain(stl10.STL10, options.archive, options.cache)
    limit = _NUM_STL10 * stl10.IMAGE_BYTES
    with open_member(path, _STL10_MEMBER, limit=limit, max_total_bytes=stl10.MAX_BYTES) as (size, read):
        if not size or size % stl10.IMAGE_BYTES:
            expected = f"a multiple of the {stl10.IMAGE_BYTES} of an image"
            raise UserError(f"{path}: {_STL10_MEMBER}: has {size} bytes, must have {expected}")
        count = wanted.count(size // stl10.IMAGE_BYTES)
        stored = (stl10.images_of(read(n * stl10.IMAGE_BYTES)) for n in _sizes(count, wanted.chunk_size))
        yield Unlabelled(
            count=count,
            chunks=(_fitted(images, wanted) for images in stored),
            citation=stl10.CITATION,
            sha256=lambda: {path.name: file_sha256(path)},
        )


@contextlib.contextmanager
def _open_folder(path: pathlib.Path, wanted: Wanted, options: SourceOptions) -> Iterator[Unlabelled]:
    """All images below a folder, in the order of their names."""
    files = _image_files(path)
    files = files[: wanted.count(len(files))]
    digests: list[str] = []

    def listing() -> dict[str, str]:
        # Lines as sha256sum prints them.
        names = (file.relative_to(path).as_posix() for file in files)
        lines = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
        return {f"{path.resolve().name}/ (listing by sha256sum)": hashlib.sha256(lines.encode()).hexdigest()}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield Unlabelled(
            count=len(files),
            chunks=(
                _decoded(files[first : first + wanted.chunk_size], pool, wanted, options, digests)
                for first in range(0, len(files), wanted.chunk_size)
            ),
            citation=f"{path.resolve().name}, a folder of the user's",
            sha256=listing,
        )


@contextlib.contextmanager
def _open_npz(path: pathlib.Path, wanted: Wanted, options: SourceOptions) -> Iterator[Unlabelled]:
    """x_unlabeled, or x_train of an archive without labels."""
    with open_images(path) as (key, shape, read):
        _require_shape(shape[1:], wanted, options, f"{path}: {key}")
        count = wanted.count(shape[0])
        yield Unlabelled(
            count=count,
            chunks=(_fitted(read(num), wanted) for num in _sizes(count, wanted.chunk_size)),
            citation=f"{path.name}, an archive of the user's",
            sha256=lambda: {path.name: file_sha256(path)},
        )


def _sizes(count: int, chunk_size: int) -> Iterator[int]:
    """Sizes of the chunks of `count` images."""
    return (min(chunk_size, count - first) for first in range(0, count, chunk_size))


def _require_shape(shape: tuple[int, ...], wanted: Wanted, options: SourceOptions, where: str) -> None:
    """Images of a stored shape can become those that are wanted."""
    height, width, channels = wanted.image_shape
    if shape[2] not in (1, channels):
        raise UserError(f"{where}: images have {shape[2]} channels, the network takes {channels}")
    if options.size is None and shape[:2] != (height, width):
        expected = f"the network was trained on {width}x{height}; add --size {width} to crop and resize"
        raise UserError(f"{where}: images are {shape[1]}x{shape[0]} pixels, {expected}")


def _fitted(images_NHWC: np.ndarray, wanted: Wanted) -> np.ndarray:
    """Images in the wanted shape; grey ones get equal channels."""
    height, width, channels = wanted.image_shape
    if images_NHWC.shape[1:3] != (height, width):
        planes = np.moveaxis(images_NHWC, 3, 1).reshape(-1, *images_NHWC.shape[1:3])
        resized = np.stack([np.asarray(crop_and_resize(Image.fromarray(plane), width)) for plane in planes])
        images_NHWC = np.moveaxis(resized.reshape(len(images_NHWC), -1, height, width), 1, 3)
    return np.ascontiguousarray(np.broadcast_to(images_NHWC, (len(images_NHWC), height, width, channels)))


def _image_files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        raise UserError(f"--images folder:{path}: there is no such folder")

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None

    files = []
    for folder, subfolders, names in os.walk(path, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        shown = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        files += [pathlib.Path(folder, name) for name in shown]
    if not files:
        raise UserError(f"--images folder:{path}: has no images ({', '.join(SUFFIXES)})")
    return sorted(files)


def _decoded(
    files: list[pathlib.Path], pool: ThreadPoolExecutor, wanted: Wanted, options: SourceOptions, digests: list[str]
) -> np.ndarray:
    """The images of some files; their checksums are added to `digests`."""
    height, width, channels = wanted.image_shape
    decode = functools.partial(
        decode_image, size=options.size, expected=(width, height), whose="the network was trained on"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        decoded = list(pool.map(decode, files))
    for file, (image, _) in zip(files, decoded, strict=True):
        if image.shape[2] not in (1, channels):
            raise UserError(f"{file}: has {image.shape[2]} channels, the network takes {channels}")
    digests += [digest for _, digest in decoded]
    return np.concatenate([_fitted(image[None], wanted) for image, _ in decoded])
