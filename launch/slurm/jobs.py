"""What can be handed in: a training run, the dedicated networks with their comparison, a search."""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.machines import Place, require_even
from launch.slurm.queue import job_state, record, recorded, sbatch_command, submit
from launch.slurm.script import command_script, search_script, training_script
from oat_dist.config import Config
from oat_dist.config_io import load_config, write_config
from oat_dist.dedicated import dedicated_config, find_trained
from oat_dist.engine import deepspeed_config
from oat_dist.errors import UserError, require
from oat_dist.resume import find_unfinished
from oat_dist.runs import create_run, make_folder
from oat_dist.trainer import open_all_data

_TO_COME = "<time>"


@dataclass(frozen=True, kw_only=True)
class Work:
    """Folders of a job that is about to be handed in."""

    folder: pathlib.Path
    """Where script and log lie."""
    script: str
    """The batch script."""
    runs: tuple[pathlib.Path, ...] = ()
    """Run folders it trains in."""
    new: tuple[pathlib.Path, ...] = ()
    """Folders that were made for it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, not yet handed in."""

    name: str
    """Name in the queue."""
    place: Place
    """Machines it asks for."""
    preview: str
    """The script before its folders have names."""
    make: Callable[[], Work]
    """Makes the folders."""
    tasks: int = 0
    """Tasks of an array job; 0 is none."""
    for_shell: bool = False
    """Whether the signal before the time limit is for the shell, which has whole machines."""


def training_job(settings: Sequence[str], place: Place) -> Job:
    """One run; an unfinished one of the same name and settings goes on.

    Args:
        settings: As launch/train.py takes them.
        place: The machines.

    Raises:
        UserError: A mistake in the settings.
    """
    config = load_config(settings)
    require_even(config, place.processes, str(place))

    def make() -> Work:
        run, is_new = _run_folder(config, place)
        return _beside(run / "slurm", training_script([run], place), (run,), (run,) if is_new else ())

    placeholder = pathlib.Path(config.output_dir) / f"{_TO_COME}_{config.name}"
    return Job(name=config.name, place=place, preview=training_script([placeholder], place), make=make)


def dedicated_jobs(settings: Sequence[str], place: Place, *, lambdas: Sequence[float], seeds: int) -> list[Job]:
    """An array job of dedicated networks, one task each, and after it the comparison by launch/frontier.py.

    Args:
        settings: Of the conditional run, as launch/train.py takes them.
        place: Machines of each task.
        lambdas: Increasing, with 0 and 1.
        seeds: Networks per lambda.

    Raises:
        UserError: A mistake in the settings.
    """
    ok = lambdas[0] == 0 and lambdas[-1] == 1
    require(ok, "--array-lambdas", lambdas, "must lie in [0, 1] and have both ends, which make the frame of the score")
    config = load_config(settings)
    require_even(config, place.processes, str(place))
    configs = [dedicated_config(config, lam, config.seed + seed) for lam in lambdas for seed in range(seeds)]
    folder = pathlib.Path(config.output_dir) / f"{config.name}_frontier" / "slurm"

    def make() -> Work:
        data, _ = open_all_data(config)
        missing = [one for one in configs if find_trained(one, data) is None]
        require(bool(missing), "--array-lambdas", lambdas, "all are trained; compare them with launch/frontier.py")
        runs = [_run_folder(one, place) for one in missing]
        folders = tuple(run for run, _ in runs)
        return _beside(folder, training_script(folders, place), folders, tuple(run for run, is_new in runs if is_new))

    placeholders = [pathlib.Path(config.output_dir) / f"{_TO_COME}_{one.name}_seed{one.seed}" for one in configs]
    arguments = [*settings, "--lambdas", *(f"{lam:g}" for lam in lambdas), "--seeds", str(seeds)]
    compare = command_script("launch/frontier.py", arguments, place)
    return [
        Job(name=f"{config.name}-dedicated", place=place, preview=training_script(placeholders, place), make=make,
            tasks=len(configs)),
        Job(name=f"{config.name}-frontier", place=place, preview=compare, make=lambda: _beside(folder, compare)),
    ]  # fmt: skip


def search_job(settings: Sequence[str], place: Place) -> Job:
    """A search.

    Args:
        settings: As tune/search.py takes them.
        place: The machines, which become a Ray cluster if there are several.

    Raises:
        UserError: A mistake in the settings.
    """
    from tune.search import choose_search

    run, _ = choose_search(settings, None)
    script = search_script(settings, place)
    folder = pathlib.Path(run.output_dir) / f"{run.name}_search_slurm"
    return Job(
        name=f"{run.name}-search", place=dataclasses.replace(place, processes_per_node=1), preview=script,
        make=lambda: _beside(folder, script), for_shell=True,
    )  # fmt: skip


def hand_in(job: Job, work: Work, options: Sequence[str], *, grace_s: int, after: str | None) -> str:
    """Write the script of a job and give it to the queue.

    Args:
        job: The job.
        work: From `job.make`.
        options: More options of sbatch.
        grace_s: Seconds before the time limit at which the signal is sent.
        after: A job that has to succeed first.

    Returns:
        The number of the job.

    Raises:
        UserError: The queue rejects it.
    """
    script = work.folder / f"{job.name}.sh"
    script.write_text(work.script)
    tasks = len(work.runs) if job.tasks else 0
    command = sbatch_command(job.name, script, job.place, options=options, grace_s=grace_s, tasks=tasks, after=after,
                             for_shell=job.for_shell)  # fmt: skip
    number = submit(command)
    for at, run in enumerate(work.runs):
        record(make_folder(run / "slurm"), f"{number}_{at}" if tasks else number, command)
    print(f"job {number}: {job.name}, log in {work.folder}")
    for run in work.runs:
        print(f"  {run}")
    return number


def show(job: Job, options: Sequence[str], *, grace_s: int) -> str:
    """Command and script of a job as they would be, with `<time>` for what the clock gives."""
    script = pathlib.Path(f"{_TO_COME}/{job.name}.sh")
    command = sbatch_command(job.name, script, job.place, options=options, grace_s=grace_s, tasks=job.tasks,
                             after=None, for_shell=job.for_shell)  # fmt: skip
    return f"{shlex.join(command)}\n\n{job.preview}"


def _run_folder(config: Config, place: Place) -> tuple[pathlib.Path, bool]:
    """The folder of an unfinished run, or of a new one; and whether it is new."""
    data, extra = open_all_data(config)
    run = find_unfinished(config)
    if run is None:
        return create_run(config, data, deepspeed_config(config, place.processes), place.processes, extra=extra), True
    job = recorded(run / "slurm")
    state = job_state(job) if job is not None else ""
    if ": running" in state or ": pending" in state:
        raise UserError(f"{run}: {state}; wait for it, or start a separate run with checkpoint.resume=never")
    write_config(config, run / "config.yaml")
    return run, False


def _beside(
    folder: pathlib.Path, script: str, runs: Sequence[pathlib.Path] = (), new: Sequence[pathlib.Path] = ()
) -> Work:
    return Work(folder=make_folder(folder), script=script, runs=tuple(runs), new=tuple(new))
