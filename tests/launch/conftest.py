"""Runs that several tests of entry scripts compare with, made once."""

import pytest

from tests.launch.commands import SHORT, deepspeed, only_run, run


@pytest.fixture(scope="session")
def short(digits) -> list[str]:
    """Settings of a short run."""
    return [*SHORT, f"--data.root={digits.folder.parent}"]


@pytest.fixture(scope="session")
def two_processes(short, tmp_path_factory):
    """The folder of a short run of two processes under the DeepSpeed launcher."""
    folder = tmp_path_factory.mktemp("two")
    done = run(*deepspeed(2), "launch/train.py", *short, f"--output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return only_run(folder)


@pytest.fixture(scope="session")
def one_process(short, tmp_path_factory):
    """The folder of the same run in one process."""
    folder = tmp_path_factory.mktemp("one")
    done = run("python", "launch/train.py", *short, f"--output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return only_run(folder)
