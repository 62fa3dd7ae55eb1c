"""How far a run is, in one line: from its own files, and from the queue where it was submitted."""

import json
import pathlib

from launch.slurm.queue import job_state, recorded
from oat_dist.config_io import read_config
from oat_dist.errors import UserError
from oat_dist.resume import is_finished


def status(run: pathlib.Path) -> str:
    """What is known of a run.

    Args:
        run: Its folder.

    Raises:
        UserError: It is none.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"--status {run}: not a run (no config.yaml)")
    config = read_config(run / "config.yaml")
    try:
        provenance = json.loads((run / "provenance.json").read_text())
        total = config.optim.epochs * config.steps_per_epoch(provenance["data"]["counts"]["train"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--status {run}: provenance.json is missing or damaged") from None
    if is_finished(run):
        parts = ["finished"]
    else:
        job = recorded(run / "slurm")
        parts = ["not submitted by launch/submit.py" if job is None else job_state(job)]
    parts.append(f"step {_last(run / 'metrics.jsonl', 'step') or 0} of {total}")
    rate = _last(run / "timings.jsonl", "images_per_s")
    if rate is not None:
        parts.append(f"{rate:.0f} images/s")
    loss = _last(run / "metrics.jsonl", "loss")
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    if provenance.get("resumed"):
        parts.append(f"started {len(provenance['resumed'])} times")
    return f"{run}: {', '.join(parts)}"


def _last(path: pathlib.Path, key: str) -> float | None:
    """The newest value of a key in a file of JSON lines; a line that is being written does not count."""
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            return json.loads(line)[key]
        except (ValueError, KeyError, TypeError):
            continue
    return None
