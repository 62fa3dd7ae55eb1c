"""Which run a command goes on with, from where, and that nobody else is at it.

A run is unfinished while it has no frontier.json. Only one process at a time trains in a run folder: it holds a lock
(flock) that the system takes away when the process ends, however it ends.
"""

import fcntl
import json
import pathlib
from typing import IO

from oat_dist.checkpoint import Checkpoint, CheckpointStore
from oat_dist.config import Config, computed_settings, fingerprint
from oat_dist.config_io import read_config
from oat_dist.data import PreparedData
from oat_dist.engine import deepspeed_config
from oat_dist.errors import UserError
from oat_dist.guard import forget_collapse_after
from oat_dist.metrics import keep_metrics_until
from oat_dist.runs import create_run, note_resume


class RunLock:
    """The lock on a run folder, held by the main rank from when it takes it until its process ends or releases it."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._stream: IO | None = None

    def take(self, run: pathlib.Path) -> None:
        """Lock a run folder.

        Raises:
            UserError: Another process holds it.
        """
        stream = (run / ".lock").open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise UserError(
                f"{run}: another process is training in this run folder; wait for it, or start a separate run with "
                "checkpoint.resume=never"
            ) from None
        self._stream = stream

    def release(self) -> None:
        """Let go of the folder."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def find_unfinished(config: Config) -> pathlib.Path | None:
    """The run that `checkpoint.resume` asks to go on with, or None for a new one.

    Args:
        config: Configuration of the command.

    Raises:
        UserError: `checkpoint.resume` names a folder that is not a run, is finished, or was made with other settings.
    """
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        runs = pathlib.Path(config.output_dir).glob(f"*_{config.name}_{fingerprint(config)}*")
        unfinished = [run for run in runs if (run / "config.yaml").is_file() and not is_finished(run)]
        return max(unfinished, key=lambda run: run.name, default=None)
    run = pathlib.Path(resume)
    if not (run / "config.yaml").is_file():
        expected = "auto, never, or the folder of a run (it has a config.yaml)"
        raise UserError(f"checkpoint.resume={resume!r}: must be {expected}")
    if is_finished(run):
        raise UserError(f"checkpoint.resume={resume!r}: that run is finished; nothing is left to do")
    theirs, ours = computed_settings(read_config(run / "config.yaml")), computed_settings(config)
    differing = [
        f"{key} ({theirs.get(key)} there, {ours.get(key)} now)" for key in ours if ours[key] != theirs.get(key)
    ]
    if differing:
        raise UserError(f"checkpoint.resume={resume!r}: made with other settings: {', '.join(differing)}")
    return run


def train_checksum(data: PreparedData) -> str:
    """sha256 of the training split, which stands for the whole data set."""
    return data.sha256["train.safetensors"]


def other_data(run: pathlib.Path, data: PreparedData, extra: PreparedData | None) -> str | None:
    """Which training images of a run are not those of today.

    Args:
        run: Folder of the run.
        data: Today's data set of `data.dataset`.
        extra: Today's data set of `data.extra`.

    Returns:
        The key of the setting that names them; None if a run of today has the same.
    """
    try:
        provenance = json.loads((run / "provenance.json").read_text())
        theirs = {key: provenance.get(key, {}).get("sha256", {}) for key in ("data", "extra_data")}
    except (OSError, ValueError, AttributeError):
        return "data.dataset"
    for key, setting, now in (("data", "data.dataset", data), ("extra_data", "data.extra", extra)):
        if theirs[key].get("train.safetensors") != (train_checksum(now) if now else None):
            return setting
    return None


def require_same_data(run: pathlib.Path, data: PreparedData, extra: PreparedData | None) -> None:
    """Refuse to go on with a run on other images than it began with.

    Raises:
        UserError: A data set was prepared anew with other content; arguments as in `other_data`.
    """
    key = other_data(run, data, extra)
    if key is not None:
        name = data.name if key == "data.dataset" or extra is None else extra.name
        raise UserError(
            f"{key}={name!r}: its training images are not those that {run}/provenance.json has the sha256 of; prepare "
            "them as they were, or start a separate run with checkpoint.resume=never"
        )


def open_run(
    config: Config, data: PreparedData, ranks: int, lock: RunLock, *, extra: PreparedData | None = None
) -> tuple[pathlib.Path, Checkpoint | None]:
    """The locked folder of a new run, or of an unfinished one with its newest checkpoint; on the main rank.

    Args:
        config: Configuration of the command.
        data: Its data set.
        ranks: Number of ranks.
        lock: Takes the folder.
        extra: The data set of `data.extra`.

    Raises:
        UserError: As `find_unfinished`, `require_same_data`, `RunLock.take`, `create_run` and `rewind`.
    """
    run = find_unfinished(config)
    if run is None:
        run = create_run(config, data, deepspeed_config(config, ranks), ranks, extra=extra)
        lock.take(run)
        return run, None
    require_same_data(run, data, extra)
    lock.take(run)
    checkpoint = rewind(run, keep=config.checkpoint.keep)
    step = checkpoint.step if checkpoint else 0
    note_resume(run, step, ranks)
    print(f"going on with {run} at step {step}")
    return run, checkpoint


def rewind(run: pathlib.Path, *, keep: int, whole_epochs: bool = False) -> Checkpoint | None:
    """Take a run back to its newest checkpoint: what later steps left behind is dropped, since they come again.

    Args:
        run: Folder of the run, locked.
        keep: `checkpoint.keep`.
        whole_epochs: Pass over a checkpoint from within an epoch.

    Returns:
        The checkpoint; None where the run begins anew.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    checkpoint = CheckpointStore(run / "checkpoints", keep=keep).newest(whole_epochs=whole_epochs)
    step = checkpoint.step if checkpoint else 0
    keep_metrics_until(run, step)
    forget_collapse_after(run, step)
    return checkpoint


def is_finished(run: pathlib.Path) -> bool:
    """Whether a run was trained and measured to its end."""
    return (run / "frontier.json").is_file()
