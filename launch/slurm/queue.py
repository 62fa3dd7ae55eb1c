"""sbatch and squeue: hand a job in, ask after it. Arguments are passed as a list, so no shell reads them."""

import json
import pathlib
import shlex
import subprocess
from collections.abc import Sequence

from launch.machines import Place
from oat_dist.errors import UserError
from oat_dist.weights import whole_file

_TIMEOUT_S = 60
_RECORD = "job.json"


def sbatch_command(
    name: str, script: pathlib.Path, place: Place, *, options: Sequence[str], grace_s: int, tasks: int = 0,
    after: str | None = None, for_shell: bool = False,
) -> list[str]:  # fmt: skip
    """The command that hands a job in.

    Args:
        name: Of the job.
        script: The batch script; the log is written beside it.
        place: The machines.
        options: More options of sbatch, e.g. `--time=4:00:00`.
        grace_s: Seconds before the time limit at which SIGUSR1 is sent.
        tasks: Tasks of an array job; 0 is none.
        after: A job that has to succeed first.
        for_shell: The script needs whole machines, and the signal for its shell instead of the processes it started.
    """
    # A percent sign would begin one of Slurm's own patterns.
    log = str(script.parent.resolve() / "log").replace("%", "%%")
    return [
        "sbatch", "--parsable", f"--job-name={name}", f"--nodes={place.nodes}",
        f"--ntasks-per-node={place.processes_per_node}",
        *([f"--gpus-per-node={place.gpus_per_node}"] if place.gpus_per_node else []),
        f"--signal={'B:' if for_shell else ''}USR1@{grace_s}", "--requeue", "--open-mode=append",
        f"--output={log}_{'%A_%a' if tasks else '%j'}.txt",
        *([f"--array=0-{tasks - 1}"] if tasks else []),
        *([f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []),
        *(["--exclusive"] if for_shell else []), *options, str(script.resolve()),
    ]  # fmt: skip


def submit(command: Sequence[str]) -> str:
    """Hand a job in.

    Args:
        command: From `sbatch_command`.

    Returns:
        The number of the job.

    Raises:
        UserError: The queue rejects it, or there is none.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError("sbatch: not found; submit on a machine of the cluster, or look with --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch: no answer within {_TIMEOUT_S} s; is the queue up?") from None
    if done.returncode:
        said = " ".join(done.stderr.replace("sbatch: error:", "").split()) or f"exit code {done.returncode}"
        raise UserError(f"{shlex.join(command[:1])}: the queue rejects the job: {said}")
    return done.stdout.strip().partition(";")[0]


def record(folder: pathlib.Path, job: str, command: Sequence[str]) -> None:
    """Note in a folder which job works there."""
    with whole_file(folder / _RECORD) as temporary:
        temporary.write_text(json.dumps({"job": job, "command": list(command)}, indent=1) + "\n")


def recorded(folder: pathlib.Path) -> str | None:
    """The job that `record` noted, or None."""
    try:
        return str(json.loads((folder / _RECORD).read_text())["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def job_state(job: str) -> str:
    """What the queue says of a job, in a few words."""
    ask = ["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%T|%R|%M"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return f"job {job}: no queue answers here"
    line = done.stdout.partition("\n")[0]
    if done.returncode or not line:
        return f"job {job}: no longer in the queue"
    state, where, time = line.split("|")
    if state == "RUNNING":
        return f"job {job}: running on {where} for {time}"
    return f"job {job}: {state.lower()} {where}"
