"""Where images come from: each source is a function that gives pixels, labels, splits and default augmentation."""

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from oat_dist.data.sources.cifar import read_cifar10, read_cifar100
from oat_dist.data.sources.digits import read_digits
from oat_dist.data.sources.folder import read_folder
from oat_dist.data.sources.npz import read_npz
from oat_dist.data.sources.source import Source, SourceOptions
from oat_dist.data.sources.stl10 import read_stl10
from oat_dist.data.sources.svhn import read_svhn
from oat_dist.errors import UserError

__all__ = ["NAMES", "OPTIONS", "SOURCES", "Source", "SourceOptions", "check_request", "default_name", "read_source"]


@dataclass(frozen=True)
class _Kind:
    read: Callable[..., Source]
    takes: tuple[str, ...] = ()
    """Options of `SourceOptions` that mean something here."""
    has_path: bool = False


SOURCES: Mapping[str, Callable[[], Source]] = {"digits": read_digits}
"""Data sets that come with the installation."""

_READERS = {
    "digits": _Kind(lambda _: read_digits()),
    "cifar10": _Kind(read_cifar10, ("archive", "num_val")),
    "cifar100": _Kind(read_cifar100, ("archive", "num_val")),
    "svhn": _Kind(read_svhn, ("archive", "num_val")),
    "stl10": _Kind(read_stl10, ("archive", "num_val")),
    "folder": _Kind(read_folder, ("num_val", "num_test", "size"), has_path=True),
    "npz": _Kind(read_npz, ("num_val", "num_test"), has_path=True),
}

OPTIONS = {"archive": "--source", "num_val": "--val", "num_test": "--test", "size": "--size"}
"""Field of `SourceOptions` -> its name on the command line."""

NAMES = tuple(f"{name}:PATH" if kind.has_path else name for name, kind in _READERS.items())
"""What may be asked for."""


def check_request(request: str, options: SourceOptions) -> None:
    """Refuse a request that no source can answer, before anything is written or fetched.

    Args:
        request: One of `NAMES`, with a path in place of PATH.
        options: What is asked of it.

    Raises:
        UserError: Unknown source, missing path, or an option that the source does not take.
    """
    name, path = _parse(request)
    for field, option in OPTIONS.items():
        value = getattr(options, field)
        if value is not None and field not in _READERS[name].takes:
            takers = ", ".join(other for other, kind in _READERS.items() if field in kind.takes)
            raise UserError(f"{option}={value}: {name} does not take it; these do: {takers}")
    if path is not None and not path.exists():
        raise UserError(f"{request}: there is no {path}")


def read_source(request: str, options: SourceOptions) -> Source:
    """Read all images of a source into memory.

    Args:
        request: One of `NAMES`, with a path in place of PATH.
        options: What is asked of it.

    Raises:
        UserError: Unknown source, or its files cannot be fetched or read, or are damaged.
    """
    check_request(request, options)
    name, path = _parse(request)
    return _READERS[name].read(options) if path is None else _READERS[name].read(path, options)


def default_name(request: str) -> str:
    """Name of a data set that was given none: the source's, or the last part of its path (an .npz without suffix)."""
    name, path = _parse(request)
    if path is None:
        return name
    return path.resolve().name.removesuffix(".npz")


def _parse(request: str) -> tuple[str, pathlib.Path | None]:
    name, colon, path = request.partition(":")
    if name in _READERS and _READERS[name].has_path == bool(path) == bool(colon):
        return name, pathlib.Path(path) if path else None
    raise UserError(f"data set {request!r}: expected one of {', '.join(NAMES)}")
