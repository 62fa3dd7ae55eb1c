"""Entry scripts as a user starts them, and a short training run that tests of many kinds compare with."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
BIN = pathlib.Path(sys.executable).parent
STEPS = 15
# One thread per process and shared statistics, so that only what a test changes could make a difference.
SHORT = ["--config", str(ROOT / "launch/configs/digits.yaml"), "--optim.epochs=3", "--optim.lr=0.02",
         "--optim.batch_size=240", "--attack.steps=2", "--evaluation.steps=2", "--evaluation.lambdas=[0, 1]",
         "--engine.threads=1", "--logging.interval_steps=1", "--logging.tensorboard=false",
         "--data.loader=memory"]  # fmt: skip
RESULTS = ("metrics.jsonl", "frontier.json", "model.safetensors")


def environment(**more: str) -> dict[str, str]:
    """Variables of a command: this Python's scripts first, wide lines, no colours."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "120", **more}


def run(*command: str, timeout: float = 300, **settings) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    settings = {"cwd": ROOT, "env": environment()} | settings
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **settings)


def free_port() -> int:
    """A port of the loopback address that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def deepspeed(processes: int) -> list[str]:
    """Begin of a command under the DeepSpeed launcher, at a free port."""
    return ["deepspeed", "--num_accelerators", str(processes), "--master_port", str(free_port())]


def only_run(folder: pathlib.Path) -> pathlib.Path:
    """The one run in an output folder."""
    (found,) = (path for path in folder.iterdir() if (path / "config.yaml").is_file())
    return found


def steps_done(folder: pathlib.Path) -> int:
    """Steps that the one run in an output folder has logged; 0 while there is none."""
    for path in folder.glob("*/metrics.jsonl"):
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return json.loads(lines[-1])["step"] if lines else 0
    return 0


def wait_for(condition, limit_s: float, complaint: str) -> None:
    """Ask again and again until a condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.02)


def require_same(run: pathlib.Path, expected: pathlib.Path) -> None:
    """Two runs ended in the same state, to the last bit."""
    for name in RESULTS:
        assert (run / name).read_bytes() == (expected / name).read_bytes(), f"{name} differs"
