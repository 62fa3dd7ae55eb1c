"""Train on a Slurm cluster.

    python launch/submit.py --config X --nodes 2 --gpus-per-node 8 --time 4:00:00 [--section.field=value ...]
    python launch/submit.py --config X --array-lambdas 0 0.1 1 --seeds 3 ...   dedicated networks, then their comparison
    python launch/submit.py --config tune/configs/cifar10.yaml --search ...    a search
    python launch/submit.py ... --dry-run                                      what would be handed in; writes nothing
    python launch/submit.py --status RUN                                       how far it is

The run folder is made at once; script and log are in its slurm/. At a time limit or preemption a run saves a checkpoint
within one step, goes back into the queue, and on from there. Without --gpus-per-node it trains on CPUs.
"""

import argparse
import pathlib
import re
import shutil
from collections.abc import Sequence

from launch import ArgumentParser, run_main
from launch.machines import Place
from launch.slurm.jobs import Job, dedicated_jobs, hand_in, search_job, show, training_job
from launch.slurm.status import status
from oat_dist.errors import UserError, require

_TIME = re.compile(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})")


def main(argv: Sequence[str]) -> None:
    """Parse, check, make the jobs, hand them in."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="machines")
    add("--gpus-per-node", type=int, default=0, help="GPUs of each, one process on each; 0 trains on CPUs")
    add("--processes-per-node", type=int, help="processes on each machine without GPUs; default 1")
    add("--cpus-per-process", type=int, help="CPUs of each process; default: the queue's")
    add("--time", help="time limit as sbatch takes it: minutes, H:MM:SS or D-H; default: the queue's")
    add("--partition", help="where to; other options of sbatch are taken from its variables, e.g. SBATCH_ACCOUNT")
    add("--grace", type=int, default=120, help="seconds before the time limit at which a run saves and stops")
    add("--array-lambdas", type=float, nargs="+", help="dedicated networks, one job of an array for each")
    add("--seeds", type=int, default=1, help="dedicated networks per lambda")
    add("--search", action="store_true", help="tune/search.py instead of training")
    add("--dry-run", action="store_true", help="print what would be handed in, and write nothing")
    add("--status", type=pathlib.Path, metavar="RUN", help="print how far a run is")
    args, rest = parser.parse_known_args(argv)
    if args.status is not None:
        print(status(args.status))
        return
    for name in ("nodes", "seeds", "grace"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "must be at least 1")
    require(args.gpus_per_node >= 0, "--gpus-per-node", args.gpus_per_node, "must be at least 0")
    if args.gpus_per_node and args.processes_per_node not in (None, args.gpus_per_node):
        raise UserError(f"--processes-per-node={args.processes_per_node}: with GPUs there is one process on each")
    per_node = args.gpus_per_node or (1 if args.processes_per_node is None else args.processes_per_node)
    cpus = args.cpus_per_process
    require(cpus is None or cpus >= 1, "--cpus-per-process", cpus, "must be at least 1")
    require(per_node >= 1, "--processes-per-node", args.processes_per_node, "must be at least 1")
    if args.time is not None and not _TIME.fullmatch(args.time):
        raise UserError(f"--time={args.time!r}: must be minutes, MM:SS, H:MM:SS, D-H or D-H:MM:SS")
    place = Place(nodes=args.nodes, gpus_per_node=args.gpus_per_node, processes_per_node=per_node)
    options = [f"--{name}={getattr(args, name)}" for name in ("time", "partition") if getattr(args, name) is not None]
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    hand_in_all(make_jobs(args, rest, place), options, grace_s=args.grace, is_dry=args.dry_run)


def make_jobs(args: argparse.Namespace, rest: Sequence[str], place: Place) -> list[Job]:
    """What the arguments ask for; a mistake in the configuration is found here, and nothing is written yet."""
    if args.search:
        require(args.array_lambdas is None, "--array-lambdas", args.array_lambdas, "does not go with --search")
        return [search_job(rest, place)]
    if args.array_lambdas is not None:
        return dedicated_jobs(rest, place, lambdas=tuple(sorted(set(args.array_lambdas))), seeds=args.seeds)
    return [training_job(rest, place)]


def hand_in_all(jobs: Sequence[Job], options: Sequence[str], *, grace_s: int, is_dry: bool) -> None:
    """Hand jobs in, each after the one before; if the queue rejects one, what was made for it is removed.

    Raises:
        UserError: The queue rejects a job.
    """
    after = None
    for job in jobs:
        if is_dry:
            print(show(job, options, grace_s=grace_s))
            continue
        work = job.make()
        try:
            after = hand_in(job, work, options, grace_s=grace_s, after=after)
        except UserError:
            for folder in work.new:
                shutil.rmtree(folder)
            raise


if __name__ == "__main__":
    run_main(main)
