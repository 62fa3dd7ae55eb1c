"""Images from a folder: train/<class>/*, test/<class>/* and optionally val/<class>/*.

Letters: H, W, C channels (1 when every image is grey, else 3).
"""

import functools
import hashlib
import io
import os
import pathlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

from oat_dist.data.sources.source import Source, SourceOptions, crop_shift, split_rows
from oat_dist.errors import UserError
from oat_dist.progress import progress_bar

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
"""File names that count as images, in either case."""
MAX_PIXELS = 1 << 26
"""Most pixels that an image may decode to; a small file can announce billions."""

# No other decoder of pillow's is reached: some start other programs.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
_MAX_FILE_BYTES = 1 << 28
# Decoding leaves Python's lock, so threads pay for large images (and none can die and leave us waiting); 55,000 images
# of 32x32 take 17 s in one thread and 26 s in two.
_MIN_THREADED_PIXELS = 1 << 14
_PARTS = ("train", "val", "test")
_GREY = ("1", "L", "LA")
# More than 8 bits per channel; pillow would clip them.
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")


def read_folder(path: pathlib.Path, options: SourceOptions) -> Source:
    """Read a folder of images; classes are the names of the folders in train/, in alphabetical order.

    Args:
        path: The folder.
        options: `size` crops the middle square and resizes it; `num_test` moves the last images of each class, in
            proportion, from train to test, after which `num_val` are held out.

    Raises:
        UserError: An image cannot be read or has another size than the first, or a class has no images or is not the
            same in all parts; the file or folder is named.
    """
    if not path.is_dir():
        raise UserError(f"folder:{path}: there is no such folder")
    if not (path / "train").is_dir():
        raise UserError(f"folder:{path}: has no train/; expected train/<class>/*.png and test/<class>/*.png")
    parts = [part for part in _PARTS if (path / part).is_dir()]
    classes = _class_names(path / "train")
    files = [_class_files(path / part, classes) for part in parts]
    labels_N = np.concatenate([np.repeat(np.arange(len(classes)), [len(of_class) for of_class in f]) for f in files])
    counts = {part: sum(map(len, f)) for part, f in zip(parts, files, strict=True)}
    # A split that cannot be is said before the images are decoded.
    splits = split_rows(labels_N, counts, options, where=str(path), by_class=True)
    flat = [file for of_part in files for of_class in of_part for file in of_class]
    images_NHWC, digests = _decode_all(flat, options.size)
    # Lines as sha256sum prints them, in the order of the names.
    names = sorted(zip((file.relative_to(path).as_posix() for file in flat), digests, strict=True))
    listing = "".join(f"{digest}  {name}\n" for name, digest in names)
    return Source(
        images_NHWC=images_NHWC,
        labels_N=labels_N,
        classes=classes,
        splits=splits,
        shift_pixels=crop_shift(images_NHWC),
        citation=f"{path.name}, a folder of the user's",
        sha256={f"{path.name}/ (listing by sha256sum)": hashlib.sha256(listing.encode()).hexdigest()},
    )


def _class_names(folder: pathlib.Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: has no class folders; expected {folder.name}/<class>/*.png")
    return tuple(names)


def _class_files(folder: pathlib.Path, classes: Sequence[str]) -> list[list[pathlib.Path]]:
    """Image files of each class, by name."""
    found = _class_names(folder)
    for name in sorted(set(found) ^ set(classes)):
        have, lack = (folder.name, "train") if name in found else ("train", folder.name)
        raise UserError(f"{folder}: class {name!r} is in {have} but not in {lack}; parts must have the same classes")
    files = []
    for name in classes:
        of_class = sorted(
            pathlib.Path(entry.path)
            for entry in os.scandir(folder / name)
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
        )
        if not of_class:
            raise UserError(f"{folder / name}: has no images ({', '.join(SUFFIXES)})")
        files.append(of_class)
    return files


def _decode_all(files: Sequence[pathlib.Path], size: int | None) -> tuple[np.ndarray, list[str]]:
    """All images, uint8 [N, H, W, C], and the checksums of their files."""
    digests, grey = [], True
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        progress_bar("decoding", len(files), is_main=True) as advance,
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        first = _open(files[0])[0].size
        width, height = (size, size) if size else first
        images_NHWC = np.empty((len(files), height, width, 3), np.uint8)
        decode = functools.partial(decode_image, size=size, expected=first, whose=str(files[0]))
        decoded = (pool.map if first[0] * first[1] >= _MIN_THREADED_PIXELS else map)(decode, files)
        try:
            for pixels, digest in decoded:
                images_NHWC[len(digests)] = pixels
                digests.append(digest)
                grey &= pixels.shape[2] == 1
                advance()
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return images_NHWC[..., :1] if grey else images_NHWC, digests


def decode_image(
    file: pathlib.Path, *, size: int | None, expected: tuple[int, int], whose: str
) -> tuple[np.ndarray, str]:
    """Read one image.

    Args:
        file: A BMP, JPEG, PNG, PPM or WebP file.
        size: Height and width to crop and resize to; None: the image must be as expected.
        expected: (width, height).
        whose: What expects it, for the message.

    Returns:
        [H, W, 1 or 3] uint8, and the checksum of the file.

    Raises:
        UserError: It cannot be read, or has another size; the file is named.
    """
    image, body = _open(file)
    if size is None and image.size != expected:
        ours, theirs = ("{}x{}".format(*pair) for pair in (image.size, expected))
        raise UserError(f"{file}: is {ours} pixels, {whose} {theirs}; add --size N to crop and resize all")
    try:
        pixels = image.convert("L" if image.mode in _GREY else "RGB")
    # Decoders of damaged bytes raise anything.
    except Exception as error:
        raise UserError(f"{file}: unreadable image: {_one_line(error)}") from None
    array = np.asarray(pixels if size is None else crop_and_resize(pixels, size))
    return array if array.ndim == 3 else array[..., None], hashlib.sha256(body).hexdigest()


def crop_and_resize(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, resized; one that has the size stays as it is."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _open(file: pathlib.Path) -> tuple[Image.Image, bytes]:
    """An image whose header is read and accepted, and the bytes of its file."""
    try:
        with file.open("rb") as stream:
            body = stream.read(_MAX_FILE_BYTES)
        image = Image.open(io.BytesIO(body), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{file}: refused, it would decode to more than {MAX_PIXELS} pixels") from None
    except OSError as error:
        reason = error.strerror or "not a BMP, JPEG, PNG, PPM or WebP file"
        raise UserError(f"{file}: unreadable image: {reason}") from None
    except Exception as error:
        raise UserError(f"{file}: unreadable image: {_one_line(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{file}: refused, it would decode to more than {MAX_PIXELS} pixels")
    if image.mode in _DEEP:
        raise UserError(f"{file}: has more than 8 bits per channel ({image.mode}); convert it to 8")
    return image, body


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
