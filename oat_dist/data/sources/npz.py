"""Images from a NumPy archive: x_train, y_train, and optionally x_val, y_val, x_test, y_test and classes.

x is uint8 [N, H, W, C] or [N, H, W], y integers [N], classes names in the order of the labels. Nothing is unpickled.
Images without labels (x_unlabeled, or x_train alone) are read piece by piece.
"""

import contextlib
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from oat_dist.data.checksum import file_sha256
from oat_dist.data.sources.source import Source, SourceOptions, check_labels, crop_shift, split_rows
from oat_dist.errors import UserError

MAX_BYTES = 1 << 36
"""Most bytes that an archive may unpack to: 64 GiB, far beyond what one keeps in memory."""

_PARTS = ("train", "val", "test")
_MAX_CHANNELS = 4


def read_npz(path: pathlib.Path, options: SourceOptions) -> Source:
    """Read an archive; see the module for its keys.

    Args:
        path: The .npz file.
        options: `num_test` moves the last training images to test, after which `num_val` are held out.

    Raises:
        UserError: The file or one of its arrays is missing, damaged, or of another type or shape.
    """
    arrays = _load(path)
    for part in ("train", *(part for part in _PARTS if f"x_{part}" in arrays or f"y_{part}" in arrays)):
        for key in (f"x_{part}", f"y_{part}"):
            if key not in arrays:
                raise UserError(f"{path}: has no {key}; expected x_train, y_train, [x_val, y_val,] x_test, y_test")
    images = {part: _images(arrays[f"x_{part}"], f"{path}: x_{part}") for part in _PARTS if f"x_{part}" in arrays}
    labels = {part: _labels(arrays[f"y_{part}"], len(images[part]), f"{path}: y_{part}") for part in images}
    shape = images["train"].shape[1:]
    for part, x in images.items():
        if x.shape[1:] != shape:
            raise UserError(f"{path}: x_{part}: images are {x.shape[1:]}, those of x_train {shape}; must be the same")
    classes = _classes(arrays.get("classes"), labels["train"], str(path))
    for part, y in labels.items():
        check_labels(y, len(classes), f"{path}: y_{part}")
    missing = np.setdiff1d(np.arange(len(classes)), labels["train"])
    if len(missing):
        raise UserError(f"{path}: y_train: class {missing[0]} of {len(classes)} has no training image")
    images_NHWC, labels_N = np.concatenate(list(images.values())), np.concatenate(list(labels.values()))
    counts = {part: len(y) for part, y in labels.items()}
    return Source(
        images_NHWC=images_NHWC,
        labels_N=labels_N,
        classes=classes,
        splits=split_rows(labels_N, counts, options, where=str(path)),
        citation=f"{path.name}, an archive of the user's",
        shift_pixels=crop_shift(images_NHWC),
        sha256={path.name: file_sha256(path)},
    )


@contextlib.contextmanager
def open_images(
    path: pathlib.Path,
) -> Iterator[tuple[str, tuple[int, int, int, int], Callable[[int], np.ndarray]]]:
    """Images without labels, piece by piece, so that they need not fit into memory.

    Args:
        path: An .npz with x_unlabeled, or x_train and no y_train.

    Yields:
        The name of the array, its shape [N, H, W, C], and a function that reads the next [n, H, W, C] of it.

    Raises:
        UserError: The file or its array is missing, damaged, or of another type or shape.
    """
    with contextlib.ExitStack() as stack:
        with _readable(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
        names = archive.namelist()
        key = "x_unlabeled" if "x_unlabeled.npy" in names else "x_train"
        if f"{key}.npy" not in names:
            raise UserError(f"{path}: has no x_unlabeled and no x_train; expected uint8 [N, H, W, C]")
        if key == "x_train" and "y_train.npy" in names:
            raise UserError(f"{path}: its x_train has labels (y_train); name the images to be labelled x_unlabeled")
        with _readable(path):
            stream = stack.enter_context(archive.open(f"{key}.npy"))
            shape = _stored_shape(stream, archive.getinfo(f"{key}.npy").file_size, f"{path}: {key}")

        def read(num: int) -> np.ndarray:
            with _readable(path):
                body = stream.read(num * math.prod(shape[1:]))
                return np.frombuffer(body, np.uint8).reshape(num, *shape[1:])

        yield key, shape, read
        with _readable(path):  # the checksum of a member is compared at its end
            while stream.read(1 << 20):
                pass


def _load(path: pathlib.Path) -> dict[str, np.ndarray]:
    wanted = {f"{kind}_{part}" for kind in "xy" for part in _PARTS} | {"classes"}
    with _readable(path):
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
        if total > MAX_BYTES:
            raise UserError(f"{path}: unpacks to {total} bytes, at most {MAX_BYTES} are read")
        with np.load(path, allow_pickle=False) as content:
            return {key: content[key] for key in content.files if key in wanted}


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """What goes wrong while an archive is read, in one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"npz:{path}: there is no such file") from None
    # Damaged members raise whatever zlib, the header's parser or an absurd shape leads to.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: damaged or not an .npz of plain arrays: {reason}") from None


def _stored_shape(stream: zipfile.ZipExtFile, num_bytes: int, where: str) -> tuple[int, int, int, int]:
    """[N, H, W, C] of an array stored in `num_bytes`: a header, and all pixels after it."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, is_fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
    if dtype != np.uint8 or len(shape) not in (3, 4) or min(shape) < 1 or is_fortran:
        order = " in Fortran order" if is_fortran else ""
        expected = "uint8 [N, H, W, C] or [N, H, W] with values 0 to 255, in C order"
        raise UserError(f"{where}: must be {expected}, got {dtype} {list(shape)}{order}")
    if num_bytes - stream.tell() != math.prod(shape):
        raise ValueError(f"{num_bytes - stream.tell()} bytes for an array {list(shape)}")
    return shape if len(shape) == 4 else (*shape, 1)


def _images(x: np.ndarray, where: str) -> np.ndarray:
    """[N, H, W, C]."""
    got = f"got {x.dtype} {list(x.shape)}"
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or 0 in x.shape:
        raise UserError(f"{where}: must be uint8 [N, H, W, C] or [N, H, W] with values 0 to 255, {got}")
    if x.ndim == 4 and x.shape[3] > _MAX_CHANNELS:
        raise UserError(f"{where}: channels come last and are at most {_MAX_CHANNELS}, {got}")
    return x if x.ndim == 4 else x[..., None]


def _labels(y: np.ndarray, num_images: int, where: str) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.shape != (num_images,):
        raise UserError(f"{where}: must be {num_images} integers, one per image, got {y.dtype} {list(y.shape)}")
    return y.astype(np.int64)


def _classes(names: np.ndarray | None, labels_N: np.ndarray, where: str) -> tuple[str, ...]:
    if names is None:
        # A negative label is reported by check_labels; a class per image is the most there can be.
        return tuple(str(number) for number in range(min(max(int(labels_N.max()), 0) + 1, len(labels_N))))
    if names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) != len(names) or not len(names):
        raise UserError(f"{where}: classes must be distinct names [K], got {names.dtype} {list(names.shape)}")
    return tuple(names.tolist())
