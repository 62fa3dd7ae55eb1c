"""A prepared data set: a folder with one file per split and format, and `dataset.json` that describes them.

    <root>/<name>/dataset.json  {train,val,test}.safetensors  {train,val,test}.beton (when FFCV is installed)

Every file holds image (uint8, [N, H, W, C]), label (int64) and index (int64, place in the source). This file reads;
`writing.py` writes.
"""

import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oat_dist.data.checksum import file_sha256
from oat_dist.data.sources import NAMES
from oat_dist.errors import UserError

SPLITS = ("train", "val", "test")
SUFFIXES = {"ffcv": ".beton", "memory": ".safetensors"}
FORMAT = 2
"""Number of the form of dataset.json; 1 had no pixel statistics and no augmentation."""


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
    pixel_mean: tuple[float, ...]
    """Mean of each channel over the training split, in [0, 1]."""
    pixel_std: tuple[float, ...]
    """Standard deviation of each channel over the training split, in units of the pixel range."""
    shift_pixels: int
    """Default augmentation: random translation by up to this many pixels."""
    flip: bool
    """Default augmentation: random left-right flip."""
    sha256: Mapping[str, str]
    """File name -> checksum."""
    source_sha256: Mapping[str, str]
    """Source file -> checksum; empty for data that comes with the installation."""
    arguments: tuple[str, ...]
    """Arguments of the script, without --out, that made it."""
    script: str = "prepare_data.py"
    """The script in launch/ that made it."""

    @property
    def command(self) -> str:
        """The command that prepares it again."""
        return prepare_command(self.arguments, self.folder.parent, self.script)

    def file(self, split: str, loader: str) -> pathlib.Path:
        """The file of a split for a loader, checked against its checksum.

        Raises:
            UserError: There is no such split, or its file is missing or damaged.
        """
        if split not in self.counts:
            has = ", ".join(self.counts)
            raise UserError(f"{self.folder}: has no {split} split, only {has}; it can be data.extra alone")
        path = self.folder / f"{split}{SUFFIXES[loader]}"
        if path.name not in self.sha256:
            raise UserError(f"data.loader={loader!r}: {path} was not prepared (no FFCV then); run: {self.command}")
        if not path.is_file():
            raise UserError(f"{path}: missing although dataset.json lists it; run: {self.command}")
        try:
            found = file_sha256(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        if found != self.sha256[path.name]:
            raise UserError(f"{path}: damaged, its sha256 is not the one in dataset.json; run: {self.command}")
        return path


def prepare_command(arguments: Sequence[str], root: pathlib.Path, script: str = "prepare_data.py") -> str:
    """The shell command that prepares a data set into `root`."""
    return f"python launch/{script} {shlex.join(arguments)} --out {shlex.quote(str(root))}"


def open_prepared(root: str, name: str, *, key: str = "data.dataset") -> PreparedData:
    """Read the description of a prepared data set.

    Args:
        root: Folder of data sets, `data.root`.
        name: Name of one.
        key: Setting that names it, `data.dataset` or `data.extra`.

    Raises:
        UserError: There is none of this name, or its description is unreadable or of an older form.
    """
    folder = pathlib.Path(root) / name
    path = folder / "dataset.json"
    arguments, script = [name] if name in NAMES else ["SOURCE", "--name", name], "prepare_data.py"
    if key == "data.extra" and name not in NAMES:
        arguments, script = ["--run", "RUN", "--images", "SOURCE", "--name", name], "pseudo_label.py"
    again = f"run: {prepare_command(arguments, folder.parent, script)}"
    try:
        about = json.loads(path.read_text())
        if about["format"] != FORMAT:
            raise KeyError("format")
        return PreparedData(
            folder=folder,
            name=about["name"],
            classes=tuple(about["classes"]),
            image_shape=tuple(about["image_shape"]),
            counts=dict(about["counts"]),
            pixel_mean=tuple(about["pixel_mean"]),
            pixel_std=tuple(about["pixel_std"]),
            shift_pixels=int(about["augmentation"]["shift_pixels"]),
            flip=bool(about["augmentation"]["flip"]),
            sha256=dict(about["sha256"]),
            source_sha256=dict(about["source_sha256"]),
            arguments=tuple(about["arguments"]),
            script=about.get("script", "prepare_data.py"),
        )
    except OSError as error:
        expected = f"no prepared data set at {folder} ({error.strerror}); {again}, or set data.root to where it is"
        raise UserError(f"{key}={name!r}: {expected}") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: damaged, or written by an older version; {again}") from None
