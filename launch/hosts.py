"""Check a host file, then train on its hosts through DeepSpeed's launcher (pdsh over ssh).

    python launch/hosts.py --hostfile hosts [--port 29500] launch/train.py --config X [--section.field=value ...]

A host file has lines like `node1 slots=8`: a name that ssh reaches without a password, and the processes there, one for
each GPU. `deepspeed --hostfile hosts launch/train.py ...` does the same without the checks.
"""

import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from launch import ArgumentParser, run_main
from launch.machines import require_even
from oat_dist.config_io import load_config
from oat_dist.errors import UserError, require

_LINE = re.compile(r"(?P<host>[\w.:@-]+)\s+slots=(?P<slots>\d+)")
_TIMEOUT_S = 10


def main(argv: Sequence[str]) -> None:
    """Parse, check, become the launcher."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--hostfile", type=pathlib.Path, required=True, help="lines `HOST slots=N`")
    add("--port", type=int, default=29500, help="where the processes meet, on the first host")
    add("script", help="launch/train.py")
    add("rest", nargs="...", help="its arguments")
    args = parser.parse_args(argv)
    require(1024 <= args.port < 65536, "--port", args.port, "must lie in [1024, 65536)")
    slots = read_hosts(args.hostfile)
    if pathlib.Path(args.script).name == "train.py":
        require_even(load_config(args.rest), sum(slots.values()), f"{len(slots)} hosts with {_counts(slots)} processes")
    if shutil.which("pdsh") is None:
        raise UserError("pdsh: not found; install it (Debian: apt install pdsh), DeepSpeed's launcher needs it")
    require_reachable(args.hostfile, list(slots))
    where = ["--hostfile", str(args.hostfile), "--master_port", str(args.port)]
    command = ["deepspeed", "--force_multi", *where, args.script, *args.rest]
    os.execvp(command[0], command)


def read_hosts(path: pathlib.Path) -> dict[str, int]:
    """Host -> processes there.

    Raises:
        UserError: The file cannot be read, a line is no host, or a host stands there twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: {getattr(error, 'strerror', None) or 'not text'}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None or not int(found["slots"]) or found["host"].startswith("-"):
            raise UserError(f"--hostfile {path}: line {number}: {line!r}: must be `HOST slots=N` with N at least 1")
        if found["host"] in slots:
            raise UserError(f"--hostfile {path}: line {number}: host {found['host']} stands there twice; add its slots")
        slots[found["host"]] = int(found["slots"])
    if not slots:
        raise UserError(f"--hostfile {path}: names no host; write lines `HOST slots=N`")
    return slots


def require_reachable(path: pathlib.Path, hosts: Sequence[str]) -> None:
    """Refuse hosts on which ssh cannot run a command without asking.

    Raises:
        UserError: With what ssh said.
    """
    with ThreadPoolExecutor(max_workers=64) as pool:
        for host, problem in zip(hosts, pool.map(_problem, hosts), strict=True):
            if problem:
                raise UserError(f"--hostfile {path}: host {host} is not reachable: {problem}")


def _problem(host: str) -> str:
    """What ssh says when it does not get there; empty when it does."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_TIMEOUT_S}", host, "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * _TIMEOUT_S, check=False)
    except FileNotFoundError:
        return "ssh is not installed here"
    except subprocess.TimeoutExpired:
        return f"no answer within {3 * _TIMEOUT_S} s"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else ""


def _counts(slots: Mapping[str, int]) -> str:
    return " + ".join(str(n) for n in slots.values())


if __name__ == "__main__":
    run_main(main)
