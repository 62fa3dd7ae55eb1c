"""A prepared data set: a folder with one file per split and format, and `dataset.json` that describes them.

    <root>/<name>/dataset.json  {train,val,test}.safetensors  {train,val,test}.beton (when FFCV is installed)

Every file holds image (uint8, [N, H, W, C]), label (int64) and index (int64, place in the source). Each file is written
under a temporary name and renamed; dataset.json comes last, so a folder that has one is complete.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from oat_dist.data import ffcv_io
from oat_dist.data.sources import SOURCES, Source
from oat_dist.errors import UserError

SPLITS = ("train", "val", "test")
SUFFIXES = {"ffcv": ".beton", "memory": ".safetensors"}


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What `dataset.json` says."""

    folder: pathlib.Path
    """Where the files are."""
    name: str
    """Name of the data set."""
    classes: tuple[str, ...]
    """Names of the classes."""
    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    counts: Mapping[str, int]
    """Images per split."""
    sha256: Mapping[str, str]
    """File name -> checksum."""

    def file(self, split: str, loader: str) -> pathlib.Path:
        """The file of a split for a loader, checked against its checksum.

        Raises:
            UserError: It is missing or damaged.
        """
        path = self.folder / f"{split}{SUFFIXES[loader]}"
        again = f"python launch/prepare_data.py {self.name} --root {self.folder.parent}"
        if path.name not in self.sha256:
            raise UserError(f"data.loader={loader!r}: {path} was not prepared (no FFCV then); run: {again}")
        if not path.is_file():
            raise UserError(f"{path}: missing although dataset.json lists it; run: {again}")
        if file_sha256(path) != self.sha256[path.name]:
            raise UserError(f"{path}: damaged, its sha256 is not the one in dataset.json; run: {again}")
        return path


def open_prepared(root: str, name: str) -> PreparedData:
    """Read the description of a prepared data set.

    Args:
        root: Folder of data sets, `data.root`.
        name: Name of one, `data.dataset`.

    Raises:
        UserError: There is none of this name, or its description is unreadable.
    """
    folder = pathlib.Path(root) / name
    path = folder / "dataset.json"
    try:
        about = json.loads(path.read_text())
        return PreparedData(
            folder=folder,
            name=about["name"],
            classes=tuple(about["classes"]),
            image_shape=tuple(about["image_shape"]),
            counts=about["counts"],
            sha256=about["sha256"],
        )
    except OSError as error:
        known = ", ".join(sorted(SOURCES))
        expected = (
            f"no prepared data set at {folder} ({error.strerror}); data.root must hold it, or take one of: {known}"
        )
        raise UserError(f"data.dataset={name!r}: {expected}") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{path}: not a description of a data set; prepare it again") from None


def prepare(root: str, name: str) -> PreparedData:
    """Write a data set that comes with the installation, in every format this machine can write.

    Args:
        root: Folder of data sets.
        name: One of `sources.SOURCES`.

    Raises:
        UserError: Unknown name, or the folder cannot be written.
    """
    if name not in SOURCES:
        raise UserError(f"data.dataset={name!r}: cannot be made here; known: {', '.join(sorted(SOURCES))}")
    source = SOURCES[name]()
    folder = pathlib.Path(root) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sha256 = {}
        for split in SPLITS:
            sha256 |= _write_split(source, split, folder)
        about = {
            "name": name,
            "classes": source.classes,
            "image_shape": source.images_NHWC.shape[1:],
            "counts": {split: len(source.splits[split]) for split in SPLITS},
            "source": source.citation,
            "sha256": sha256,
        }
        _replace(folder / "dataset.json", lambda path: path.write_text(json.dumps(about, indent=1)))
    except OSError as error:
        raise UserError(f"data.root={root!r}: cannot write {folder}: {error.strerror or error}") from None
    return open_prepared(root, name)


def file_sha256(path: pathlib.Path) -> str:
    """Checksum of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_split(source: Source, split: str, folder: pathlib.Path) -> dict[str, str]:
    rows = source.splits[split].astype(np.int64)
    tensors = {
        "image": np.ascontiguousarray(source.images_NHWC[rows]),
        "label": source.labels_N[rows].astype(np.int64),
        "index": rows,
    }
    written = [folder / f"{split}{SUFFIXES['memory']}"]
    _replace(written[0], lambda path: path.write_bytes(safetensors.numpy.save(tensors)))
    if ffcv_io.is_installed():
        written.append(folder / f"{split}{SUFFIXES['ffcv']}")
        _replace(written[1], lambda path: ffcv_io.write_beton(path, **tensors))
    return {path.name: file_sha256(path) for path in written}


def _replace(path: pathlib.Path, write) -> None:
    """Write under a temporary name, then rename, so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
