"""Checkpoints of a run: complete, atomic, checked, few.

    <run>/checkpoints/step_00000330/  state.json  network.safetensors  averaged.safetensors  optimizer.safetensors
    <run>/checkpoints/step_00000341_within_epoch/  the same; from a run that was told to stop

A checkpoint is written into a temporary folder that is renamed when it is complete, so a killed run leaves whole ones
only. `state.json` carries the sha256 of every file; a damaged checkpoint is passed over, with a warning, for the one
before. Writing goes on in a thread while training continues: only copying to host memory holds the step up.
"""

import hashlib
import json
import pathlib
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
from torch import Tensor

from oat_dist.errors import UserError
from oat_dist.weights import read_tensors

_STATE = "state.json"
_WITHIN = "_within_epoch"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    folder: pathlib.Path
    """Where it is."""
    state: dict
    """Everything that is not a tensor: step, sums of the log, configuration."""

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state["step"]

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of one part (network, averaged, optimizer), on the CPU; None if the run has no such part."""
        path = self.folder / f"{name}.safetensors"
        return read_tensors(path)[0] if path.name in self.state["files"] else None


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: pathlib.Path, *, keep: int) -> None:
        """Look after a folder, which need not exist yet.

        Args:
            folder: `<run>/checkpoints`.
            keep: How many of the newest stay.
        """
        self.folder, self.keep = folder, keep
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: dict, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the parts to the host and write them in the background.

        Args:
            state: Must hold "step"; JSON values. A true "within_epoch" marks what a stopped run leaves between two
                epochs: it is kept until the next checkpoint, in addition to those that `keep` counts.
            parts: Name of the part -> name -> tensor.

        Raises:
            UserError: This or the checkpoint before could not be written.
        """
        self.wait()
        copies = {
            part: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            for part, tensors in parts.items()
        }
        self._writer = threading.Thread(target=self._write, args=(state, copies), daemon=True)
        self._writer.start()

    def wait(self) -> None:
        """Wait for the checkpoint being written.

        Raises:
            UserError: It could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            reason = (error.strerror or error) if isinstance(error, OSError) else error
            raise UserError(f"{self.folder}: cannot write a checkpoint: {reason}; older ones are kept") from error

    def newest(self, *, whole_epochs: bool = False) -> Checkpoint | None:
        """The newest checkpoint that is not damaged, after the one being written; None when there never was one.

        Args:
            whole_epochs: Pass over those from within an epoch.

        Raises:
            UserError: There are checkpoints, and all are damaged; or the last one could not be written.
        """
        self.wait()
        folders = sorted(self._whole() if whole_epochs else self.folder.glob("step_*"), reverse=True)
        damaged = []
        for folder in folders:
            problem = _problem(folder)
            if problem is None:
                for bad, reason in damaged:
                    warnings.warn(f"{bad}: damaged ({reason}); going on from {folder.name} instead", stacklevel=2)
                return Checkpoint(folder=folder, state=json.loads((folder / _STATE).read_text()))
            damaged.append((folder, problem))
        if damaged:
            names = ", ".join(f"{folder.name} ({reason})" for folder, reason in damaged)
            raise UserError(
                f"{self.folder}: every checkpoint is damaged: {names}; start anew with checkpoint.resume=never"
            )
        return None

    def _write(self, state: dict, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        name = f"step_{state['step']:08d}" + (_WITHIN if state.get("within_epoch") else "")
        temporary = self.folder / f".{name}"
        try:
            self._remove_unfinished()
            temporary.mkdir(parents=True)
            files = {}
            for part, tensors in parts.items():
                content = safetensors.torch.save(dict(tensors))
                (temporary / f"{part}.safetensors").write_bytes(content)
                files[f"{part}.safetensors"] = hashlib.sha256(content).hexdigest()
            whole = {**state, "files": files}
            (temporary / _STATE).write_text(json.dumps({**whole, "sha256": _state_sha256(whole)}))
            final = self.folder / name
            if final.exists():  # written before a resume from an older one
                shutil.rmtree(final)
            temporary.rename(final)
            for old in [*self._whole()[: -self.keep], *self.folder.glob(f"step_*{_WITHIN}")]:
                if old != final:
                    shutil.rmtree(old)
        except Exception as error:
            self._error = error
            shutil.rmtree(temporary, ignore_errors=True)

    def _whole(self) -> list[pathlib.Path]:
        """Folders of checkpoints between epochs, oldest first."""
        return sorted(folder for folder in self.folder.glob("step_*") if not folder.name.endswith(_WITHIN))

    def _remove_unfinished(self) -> None:
        """Remove what a killed process left."""
        for folder in self.folder.glob(".step_*"):
            shutil.rmtree(folder)


def _state_sha256(state: dict) -> str:
    """Checksum of state.json but for the checksum itself."""
    body = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _problem(folder: pathlib.Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        state = json.loads((folder / _STATE).read_text())
        if state["sha256"] != _state_sha256(state):
            return f"{_STATE} does not have its checksum"
        for name, sha256 in state["files"].items():
            with (folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                    return f"{name} does not have its checksum"
        return None
    except OSError as error:
        return f"{pathlib.Path(error.filename or folder).name}: {error.strerror}"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return f"{_STATE} is unreadable"
