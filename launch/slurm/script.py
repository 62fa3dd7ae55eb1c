"""The batch script of a job.

Every value stands quoted, so a name is never run. Signals go to the processes that train (`sbatch --signal` without
`B:`); the shell waits for them and puts the job back into the queue when they say so by their exit code. A job that its
user cancelled is not put back.
"""

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from launch.machines import Place
from oat_dist.errors import PREEMPTED_EXIT_CODE

ROOT = pathlib.Path(__file__).parents[2]

_START = """\
#!/bin/bash
# Written by launch/submit.py.
cd {cwd} || exit 2
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONUNBUFFERED=1
[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# The first node, by the address under which Slurm itself knows it, and a port of this job's own.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$(scontrol -o show node "$first" | sed 's/.* NodeAddr=\\([^ ]*\\).*/\\1/')
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
trap : USR1 TERM
"""

_WAIT = """\
work=$!
# A signal interrupts `wait`, not the work.
while kill -0 "$work" 2>/dev/null; do wait "$work"; done
wait "$work"
code=$?
"""

_REQUEUE = """\
if [ "$code" = {code} ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    echo "back into the queue: $(date)"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""

_TRAIN = """\
runs=({runs})
run=${{runs[${{SLURM_ARRAY_TASK_ID:-0}}]}}
# One process per GPU; Slurm tells each its place.
place='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_SIZE={per_node}; exec "$@"'
srun --kill-on-bad-exit=1 bash -c "$place" process {python} {train} \\
    --config "$run/config.yaml" --checkpoint.resume="$run" &
"""

_SEARCH_ALONE = """\
env --default-signal=INT {python} {search} {arguments} "${{resume[@]}}" &
"""

_SEARCH_MANY = """\
# One Ray node per machine, on the address of that machine; they end with the job.
# The first node is this one. Ray takes no loopback address for a cluster of several nodes.
head=$(getent ahostsv4 "$MASTER_ADDR" | head -n 1 | cut -d " " -f 1)
case $head in 127.*) head=$(hostname -I | cut -d " " -f 1) ;; esac
export head=$head:$MASTER_PORT
# Whoever reaches the port needs the token of this job.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
ray='common="--num-cpus=$SLURM_CPUS_ON_NODE --disable-usage-stats --block"
if [ "$SLURM_NODEID" = 0 ]; then
    exec "$0" start --head --node-ip-address="${{head%:*}}" --port="${{head#*:}}" --include-dashboard=false $common
fi
until "$0" status --address="$head" >/dev/null 2>&1; do sleep 1; done
exec "$0" start --address="$head" $common'
srun --ntasks-per-node=1 bash -c "$ray" {ray} &
nodes=$!
count='import ray, sys; ray.init(sys.argv[1], log_to_driver=False); sys.exit(len(ray.nodes()) < int(sys.argv[2]))'
until {python} -c "$count" "$head" "$SLURM_NNODES" >/dev/null 2>&1; do
    kill -0 "$nodes" || exit 1
    sleep 1
done
env --default-signal=INT {python} {search} --address "$head" {arguments} "${{resume[@]}}" &
"""

_SEARCH_SIGNALS = """\
resume=()
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || resume=(--resume)
# A search goes on after Ctrl-C.
trap 'kill -INT "$work" 2>/dev/null; stopped=1' USR1 TERM
"""


def training_script(runs: Sequence[pathlib.Path], place: Place) -> str:
    """Train in run folders that are there already; the index of an array job chooses one.

    Args:
        runs: Folders with config.yaml.
        place: The machines.
    """
    body = _TRAIN.format(
        runs=" ".join(shlex.quote(str(run)) for run in runs),
        per_node=place.processes_per_node,
        python=shlex.quote(sys.executable),
        train=shlex.quote(str(ROOT / "launch/train.py")),
    )
    return _start() + body + _WAIT + _REQUEUE.format(code=PREEMPTED_EXIT_CODE)


def command_script(script: str, arguments: Sequence[str], place: Place) -> str:
    """Run an entry script with the processes of a training run, e.g. launch/frontier.py on networks that are trained.

    Args:
        script: Path below the project's folder.
        arguments: Of the script.
        place: The machines.
    """
    body = _TRAIN.format(runs="''", per_node=place.processes_per_node, python=shlex.quote(sys.executable),
                         train=shlex.quote(str(ROOT / script)))  # fmt: skip
    body = body.replace('--config "$run/config.yaml" --checkpoint.resume="$run"', shlex.join(arguments))
    return _start() + body + _WAIT + _REQUEUE.format(code=PREEMPTED_EXIT_CODE)


def search_script(arguments: Sequence[str], place: Place) -> str:
    """A search: on one machine as on any, on several on a Ray cluster of this job's own.

    Args:
        arguments: Of tune/search.py.
        place: The machines.
    """
    template = _SEARCH_ALONE if place.nodes == 1 else _SEARCH_MANY
    body = template.format(
        python=shlex.quote(sys.executable),
        search=shlex.quote(str(ROOT / "tune/search.py")),
        ray=shlex.quote(str(pathlib.Path(sys.executable).with_name("ray"))),
        arguments=shlex.join(arguments),
    )
    end = f'{_WAIT}[ -z "$stopped" ] || code={PREEMPTED_EXIT_CODE}\n'
    return _start() + _SEARCH_SIGNALS + body + end + _REQUEUE.format(code=PREEMPTED_EXIT_CODE)


def _start() -> str:
    return _START.format(cwd=shlex.quote(os.getcwd()), root=shlex.quote(str(ROOT)))
