"""What takes a run down, as it happens: killed and stopped processes, a full disk, a strange machine.

Every time the same command goes on and ends, to the last bit, as an undisturbed run. FAULTS_KILLS sets how many kills
at random steps there are (`make test-faults`: 20).
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from tests.launch.commands import (
    ROOT,
    STEPS,
    deepspeed,
    environment,
    free_port,
    only_run,
    require_same,
    run,
    steps_done,
    wait_for,
)

KILLS = int(os.environ.get("FAULTS_KILLS", "4"))
SEED = random.randrange(2**32)
can_mount = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a disk")


def start(command, env=None) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env or environment(), start_new_session=True, **pipes)


@contextlib.contextmanager
def started(command, env=None):
    """A command that does not outlive the block, nor does anything it started."""
    process = start(command, env)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def times_resumed(folder: pathlib.Path) -> int:
    """How often the one run in an output folder went on; -1 while there is none."""
    for path in folder.glob("*/provenance.json"):
        with contextlib.suppress(ValueError):  # it is being written
            return len(json.loads(path.read_text())["resumed"])
    return -1


def process_of(rank: int, launcher: subprocess.Popen) -> psutil.Process:
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "--local_rank" in " ".join(process.cmdline()) and process.environ().get("RANK") == str(rank):
                return process
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_whose_ranks_are_killed_at_random_steps_ends_bit_identical(short, two_processes, tmp_path):
    draw = random.Random(SEED)
    command = [*deepspeed(2), "launch/train.py", *short, f"--output_dir={tmp_path}"]
    for kill in range(KILLS):
        rank, wait_steps = draw.randrange(2), draw.randrange(1, 6)
        with started(command) as launcher:
            wait_for(lambda kill=kill: times_resumed(tmp_path) == kill, 180, f"it does not go on after kill {kill}")
            at = min(steps_done(tmp_path) + wait_steps, STEPS - 2)
            wait_for(lambda at=at: steps_done(tmp_path) >= at, 180, f"no step {at}")
            started_by = psutil.Process(launcher.pid).children(recursive=True)
            process_of(rank, launcher).kill()
            said, _ = launcher.communicate(timeout=120)
        about = f"seed {SEED}, kill {kill} of rank {rank} at step {at}:\n{said}"
        assert launcher.returncode not in (0, 2), about
        assert "exits with return code = -9" in said, about
        assert f"error: rank {1 - rank}: another rank is gone; the same command goes on" in said, about
        assert "Traceback" not in said, about
        assert not any(process.is_running() for process in started_by), "all ranks have ended"
    done = run(*command)
    assert done.returncode == 0, f"seed {SEED}:\n{done.stdout}{done.stderr}"
    require_same(only_run(tmp_path), two_processes)


@pytest.mark.slow
@pytest.mark.dist
def test_a_terminated_run_leaves_a_checkpoint_within_one_step_and_the_exit_code_of_a_queue(
    short, one_process, tmp_path
):
    command = [sys.executable, "launch/train.py", *short, f"--output_dir={tmp_path}"]
    with started(command) as process:
        wait_for(lambda: steps_done(tmp_path) >= 6, 180, "no step 6")
        at = steps_done(tmp_path)
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in said, said
    last = steps_done(tmp_path)
    assert last <= at + 2, "the step that ran when the signal came, and at most one before that was logged since"
    assert f"stopped at step {last} with a checkpoint; the same command goes on" in said
    assert list(tmp_path.glob(f"*/checkpoints/step_{last:08d}*/state.json"))
    done = run(*command)
    assert done.returncode == 0 and f"at step {last}" in done.stdout, done.stdout + done.stderr
    require_same(only_run(tmp_path), one_process)


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_that_is_stopped_is_named_after_the_time_limit(short, tmp_path):
    port = str(free_port())
    command = [sys.executable, "launch/train.py", *short, f"--output_dir={tmp_path}", "--engine.hang_timeout_s=4"]
    place = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    envs = [environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    with started(command, envs[0]) as main, started(command, envs[1]) as other:
        wait_for(lambda: steps_done(tmp_path) >= 2, 180, "no step 2")
        other.send_signal(signal.SIGSTOP)
        said, _ = main.communicate(timeout=60)
    assert main.returncode == 1
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert line.startswith("error: engine.hang_timeout_s: rank 1 (") and f"process {other.pid})" in line
    assert "no sign of life for 4 s; stopped, or the machine is gone; the same command goes on" in line


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
@can_mount
def test_a_disk_that_fills_up_costs_one_line_and_no_checkpoint_and_with_room_the_run_goes_on(
    short, one_process, small_disk
):
    command = [sys.executable, "launch/train.py", *short, f"--output_dir={small_disk}"]
    filler = small_disk / "filler"
    with started(command) as process:
        wait_for(lambda: list(small_disk.glob("*/checkpoints/step_*")), 180, "no checkpoint")
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(b"0" * 4096)
        said, _ = process.communicate(timeout=60)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(errors) == 1 and "No space left on device" in errors[0], said
    assert "Traceback" not in said
    filler.unlink()
    done = run(*command)
    assert done.returncode == 0 and "going on with" in done.stdout, done.stdout + done.stderr
    require_same(only_run(small_disk), one_process)


CLOCK = """
import itertools, time
real, calls = time.time, itertools.count()
time.time = lambda: real() + (-1) ** next(calls) * 1e7
"""


@pytest.mark.slow
def test_name_of_the_machine_locale_clock_and_folder_make_no_difference(short, one_process, tmp_path):
    folder = tmp_path / "a folder, ünïcode 数据 $(touch x)"
    folder.mkdir()
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    env = environment(LC_ALL="tr_TR.UTF-8", LANG="C", TZ="Pacific/Kiritimati", HOSTNAME="nowhere.invalid",
                      PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', ROOT)}")  # fmt: skip
    command = [sys.executable, "launch/train.py", *short, f"--output_dir={folder}"]
    if os.geteuid() == 0 and shutil.which("unshare"):
        named = 'hostname "no-such-host.invalid" && exec "$@"'
        command = ["unshare", "--uts", "sh", "-c", named, "sh", *command]
    done = run(*command, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    require_same(only_run(folder), one_process)


@pytest.mark.slow
def test_the_configuration_in_a_run_folder_repeats_the_run_to_the_last_bit(one_process, tmp_path):
    done = run(sys.executable, "launch/train.py", "--config", str(one_process / "config.yaml"),
               f"--output_dir={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    require_same(only_run(tmp_path), one_process)
