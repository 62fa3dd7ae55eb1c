"""A Slurm cluster of two nodes on this machine: one slurmctld, two slurmd, munge, everything in one folder."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
_CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=17002
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SchedulerParameters=batch_sched_delay=1,sched_interval=2
KillWait=20
EnforcePartLimits=ALL
InactiveLimit=0
NodeName=n[1-2] NodeHostname=localhost Port=[17003-17004] CPUs={cpus} RealMemory=100 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=ALL MaxTime=1 State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be made here, or None."""
    if os.geteuid() != 0:
        return "needs root to start a Slurm cluster"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs Slurm and munge (sh launch/setup_cluster.sh): no {', '.join(missing)}" if missing else None


@contextlib.contextmanager
def slurm_cluster(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Run a cluster while the block runs; gives the environment of its users."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(_CONF.format(folder=folder, cpus=len(os.sched_getaffinity(0))))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log",
             "seed-file": "munge.seed"}  # fmt: skip
    munge = ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
    daemons = [munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    started = []
    try:
        for command in daemons:
            log = (folder / f"{command[0]}-{command[-1]}.out" if command is not munge else folder / "munged.out").open(
                "w"
            )
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
            if command is munge:
                wait_for(lambda: (folder / "munge.socket").exists(), 20, "munged does not start")
        wait_for(lambda: _idle_nodes(env) == 2, 60, "the nodes do not come up")
        yield env
    finally:
        for options in (["--full", "--signal=KILL"], []):
            subprocess.run(["scancel", "--user=root", *options], env=env, capture_output=True, timeout=30)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: _queue(env) == "", 15, "jobs do not end")
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def wait_for(condition, limit_s: float, complaint: str) -> None:
    """Ask again and again until a condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.2)


def _queue(env: dict[str, str]) -> str:
    return subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True).stdout.strip()


def _idle_nodes(env: dict[str, str]) -> int:
    done = subprocess.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%t"], env=env, capture_output=True, text=True)
    return done.stdout.split().count("idle")
