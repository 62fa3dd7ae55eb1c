"""Reading and writing tensors as safetensors. Nothing here can run code that a file brings: there is no pickle."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

import safetensors
import safetensors.torch
from torch import Tensor, nn

from oat_dist.errors import UserError

_MOST_NAMES = 5


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a temporary path in the folder of `path`; it becomes `path` when the block ends well, else it is removed."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(tensors: Mapping[str, Tensor], path: pathlib.Path, about: Mapping[str, object] | None = None) -> None:
    """Write tensors, the same bytes for the same values.

    Args:
        tensors: Name -> tensor on any device.
        path: Target; it appears whole or not at all.
        about: JSON values for the header. They become one entry, because safetensors writes several in an order that
            changes from process to process.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"about": json.dumps(about)} if about is not None else None
    with whole_file(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(plain, metadata=header))


def read_tensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict]:
    """Read a file of `write_tensors`.

    Args:
        path: A .safetensors file.

    Returns:
        Name -> tensor on the CPU, and what the header says.

    Raises:
        UserError: It cannot be read, or is anything but safetensors.
    """
    about = read_about(path)
    with _readable(path):
        return safetensors.torch.load_file(path), about


def read_about(path: pathlib.Path) -> dict:
    """What the header of a file of `write_tensors` says, without its tensors.

    Args:
        path: A .safetensors file.

    Raises:
        UserError: As `read_tensors`.
    """
    with _readable(path), safetensors.safe_open(path, "pt") as stream:
        return json.loads((stream.metadata() or {}).get("about", "{}"))


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], path: pathlib.Path) -> None:
    """Load tensors into a module that must have exactly these names and shapes.

    Args:
        module: Target.
        tensors: Name -> tensor.
        path: Where they come from, for the message.

    Raises:
        UserError: Extra, missing or wrongly shaped tensors, by name.
    """
    state = module.state_dict()
    problems = []
    for kind, names in (("missing", state.keys() - tensors.keys()), ("unexpected", tensors.keys() - state.keys())):
        if names:
            problems.append(f"{kind}: {_some(sorted(names))}")
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(state[name].shape)}"
        for name in sorted(state.keys() & tensors.keys())
        if state[name].shape != tensors[name].shape
    ]
    if wrong:
        problems.append(f"shape: {_some(wrong)}")
    if problems:
        raise UserError(f"{path}: does not fit the network; {'; '.join(problems)}")
    module.load_state_dict(dict(tensors), strict=True)


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file: {error}") from None


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
