"""Preparing a data set: from a source to a folder that `prepared.py` reads.

Everything is written into a hidden folder beside the target and moved when it is whole; dataset.json comes last. So a
folder that has a dataset.json is complete, and a failure leaves what was there before.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from oat_dist.data.prepared import FORMAT, SPLITS, SUFFIXES, PreparedData, open_prepared
from oat_dist.data.sources import OPTIONS, Source, SourceOptions, check_request, default_name, read_source
from oat_dist.data.splits import check_space, write_split
from oat_dist.errors import UserError, require


def prepare(root: str, request: str, *, name: str | None = None, options: SourceOptions | None = None) -> PreparedData:
    """Write a data set in every format this machine can write.

    Args:
        root: Folder of data sets.
        request: One of `sources.NAMES`, with a path in place of PATH.
        name: Name of the data set, its folder in `root`; default: the source's name, or the stem of its path.
        options: What is asked of the source; default: nothing, and downloads go to `root`/archives.

    Raises:
        UserError: The request cannot be answered, the source is damaged, or the folder cannot be written.
    """
    options = options or SourceOptions(cache=pathlib.Path(root) / "archives")
    check_request(request, options)
    default = default_name(request)
    name = default if name is None else name
    check_name(name)
    folder = pathlib.Path(root) / name
    try:
        with hidden_folder(folder) as hidden:
            source = _read(request, options)
            check_space(sum(map(len, source.splits.values())), source.images_NHWC.shape[1:], hidden)
            sha256 = {}
            for split in SPLITS:
                rows = source.splits[split].astype(np.int64)
                labels_N = source.labels_N[rows].astype(np.int64)
                sha256 |= write_split(hidden, split, source.images_NHWC[rows], labels_N, rows)
            about = describe(
                source.images_NHWC[source.splits["train"]],
                name=name,
                classes=source.classes,
                counts={split: len(source.splits[split]) for split in SPLITS},
                augmentation=(source.shift_pixels, source.flip),
                citation=source.citation,
                source_sha256=source.sha256,
                sha256=sha256,
                arguments=_arguments(request, name if name != default else None, options),
            )
            (hidden / "dataset.json").write_text(json.dumps(about, indent=1))
            move(hidden, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the data set: {error.strerror or error}") from None
    return open_prepared(root, name)


def check_name(name: str) -> None:
    """Refuse a name that is not a folder of its own: hidden, that of downloads, or out of the root.

    Raises:
        UserError: The name is not one.
    """
    ok = name[:1].isalnum() and all(c.isalnum() or c in "-_.+" for c in name) and name != "archives"
    require(ok, "--name", name, "must be letters, digits and -_.+ only, begin with a letter or digit, not 'archives'")


def pixel_statistics(images_NHWC: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in units of the pixel range, from exact counts of the 256 values."""
    channels = images_NHWC.shape[3]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images_NHWC), 1000):
        chunk = images_NHWC[start : start + 1000]
        for c in range(channels):
            counts[c] += np.bincount(chunk[..., c].ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return mean.tolist(), np.sqrt(variance).tolist()


def _read(request: str, options: SourceOptions) -> Source:
    """`read_source`, with what the disk refuses to read kept apart from what it refuses to write."""
    try:
        return read_source(request, options)
    except OSError as error:
        what = error.filename or request
        raise UserError(f"{request}: cannot read {what}: {error.strerror or error}") from None


def describe(
    train_NHWC: np.ndarray,
    *,
    name: str,
    classes: Sequence[str],
    counts: Mapping[str, int],
    augmentation: tuple[int, bool],
    citation: str,
    source_sha256: Mapping[str, str],
    sha256: Mapping[str, str],
    arguments: Sequence[str],
) -> dict:
    """The content of dataset.json.

    Args:
        train_NHWC: uint8 images of the training split.
        name: Name of the data set.
        classes: Names of the classes.
        counts: Images per split.
        augmentation: Default translation in pixels, and whether to flip.
        citation: Where the data comes from.
        source_sha256: Source file -> checksum.
        sha256: Written file -> checksum.
        arguments: Command line, without --out, that asks for the same.
    """
    mean, std = pixel_statistics(train_NHWC)
    return {
        "format": FORMAT,
        "name": name,
        "classes": list(classes),
        "image_shape": train_NHWC.shape[1:],
        "counts": dict(counts),
        "pixel_mean": mean,
        "pixel_std": std,
        "augmentation": dict(zip(("shift_pixels", "flip"), augmentation, strict=True)),
        "citation": citation,
        "source_sha256": dict(source_sha256),
        "sha256": dict(sha256),
        "arguments": list(arguments),
    }


def _arguments(request: str, name: str | None, options: SourceOptions) -> list[str]:
    """The command line, without --out, that asks for the same."""
    named = {"--name": name} | {option: getattr(options, field) for field, option in OPTIONS.items()}
    return [request, *(str(part) for pair in named.items() if pair[1] is not None for part in pair)]


@contextlib.contextmanager
def hidden_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder beside `folder` that is gone after the block, with its parents if these were made for it."""
    made = [parent for parent in folder.parents if not parent.exists()]
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        hidden.mkdir(parents=True)
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for parent in made:
            # It stays when something is in it: the data set, or a part of a download.
            with contextlib.suppress(OSError):
                parent.rmdir()


def move(hidden: pathlib.Path, folder: pathlib.Path) -> None:
    """Put the files of a new data set in place of the old one's; nothing else in the folder is touched."""
    folder.mkdir(exist_ok=True)
    for name in ("dataset.json", *(f"{split}{suffix}" for split in SPLITS for suffix in SUFFIXES.values())):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(hidden.iterdir(), key=lambda path: path.name == "dataset.json"):
        path.replace(folder / path.name)
