"""What an evaluation has finished so far, so that the same command goes on after a kill.

A unit is one stage (0: clean, i: attack i) of one cell on one shard of the images. Every rank appends a JSON line per
finished unit to a file of its own; all are read again by an evaluation of the same fingerprint, on any number of ranks,
and removed when the report is written.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from types import TracebackType
from typing import IO, Self

import torch
from torch import Tensor, nn

from oat_dist.errors import UserError

_FORM = 1
"""Number of the form of a line and of what is computed; part of the fingerprint."""

Unit = tuple[int, int, int]
"""(cell, shard, stage)."""


def evaluation_fingerprint(network: nn.Module, about: object) -> str:
    """Sixteen hexadecimal digits that name what is computed.

    Args:
        network: The network; its weights and statistics count.
        about: JSON values: images, cells, attacks, seed.
    """
    digest = hashlib.sha256(json.dumps([_FORM, about], sort_keys=True).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class UnitLog:
    """Finished units of one evaluation; a context manager that closes the file of this rank."""

    def __init__(self, folder: pathlib.Path, fingerprint: str, rank: int) -> None:
        """Open the file of this rank for more lines, after what all ranks of an earlier process wrote was read.

        Args:
            folder: Where the report will be.
            fingerprint: Of `evaluation_fingerprint`.
            rank: This rank.

        Raises:
            UserError: It cannot be written.
        """
        path = folder / f"unfinished_{fingerprint}.{rank}.jsonl"
        try:
            self._stream: IO[str] = path.open("a+")
            # A line that a kill cut short must not swallow the next one.
            self._stream.write("\n")
            self._stream.flush()
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None

    def add(self, unit: Unit, found: Tensor, outside: int) -> None:
        """Write down a finished unit.

        Args:
            unit: Which.
            found: [N] bool over the images of the shard: what the stage broke.
            outside: Points it found outside the ball.
        """
        line = {"unit": unit, "found": _packed(found), "outside": outside}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._stream.close()


def finished_units(folder: pathlib.Path, fingerprint: str) -> dict[Unit, dict]:
    """What an earlier process wrote down: {"found", "outside"} of each unit; half-written lines are passed over."""
    units = {}
    for path in _files(folder, fingerprint):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
                units[tuple(entry["unit"])] = {"found": entry["found"], "outside": entry["outside"]}
            except (ValueError, KeyError, TypeError):
                continue
    return units


def forget_units(folder: pathlib.Path, fingerprint: str) -> None:
    """Remove the files of an evaluation whose report is written."""
    for path in _files(folder, fingerprint):
        path.unlink()


def unpacked(found: str, num_images: int) -> Tensor:
    """[N] bool of a line."""
    bits = bytes.fromhex(found)
    flat = torch.tensor(list(bits), dtype=torch.uint8)
    places = torch.arange(8, dtype=torch.uint8)
    return ((flat[:, None] >> places) & 1).flatten()[:num_images].bool()


def _packed(found: Tensor) -> str:
    """Hexadecimal digits, eight images a byte, the first in the lowest bit."""
    bits = torch.nn.functional.pad(found.to("cpu", torch.uint8), (0, -len(found) % 8)).view(-1, 8)
    return bytes((bits << torch.arange(8, dtype=torch.uint8)).sum(1).tolist()).hex()


def _files(folder: pathlib.Path, fingerprint: str) -> Iterable[pathlib.Path]:
    return sorted(folder.glob(f"unfinished_{fingerprint}.*.jsonl"))
