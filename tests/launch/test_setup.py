"""Set-up without installing anything: what it says where it cannot go on, and that a second call is free."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def bare(tmp_path):
    """A copy of the set-up on a machine that has Python and nothing else; returns a function that runs it."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "launch/setup.sh", "tests/browser.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname", "cksum", "cat", "id", "env"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").symlink_to(sys.executable)

    def run(script: str = "launch/setup.sh", **env: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(tools), "HOME": str(tmp_path), **env}
        script = str(tmp_path / script)
        return subprocess.run([str(tools / "sh"), script], env=environment, capture_output=True, text=True, timeout=60)

    return run


def test_where_apt_is_not_there_the_missing_packages_are_named(bare):
    done = bare()
    assert done.returncode == 1
    for package in ("g++", "pkg-config", "libopencv-dev", "libturbojpeg0-dev"):
        assert package in done.stderr.splitlines()[0]
    assert "make setup FFCV=0" in done.stderr


def test_a_python_that_is_too_old_is_named(bare, tmp_path):
    old = tmp_path / "bin/python3.9"
    old.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; *--version*) echo Python 3.9.2;; esac\nexit 0\n')
    old.chmod(0o755)
    done = bare(FFCV="0", PYTHON="python3.9")
    assert done.returncode == 1
    assert "python3.9 is Python 3.9.2, but Python 3.11 or newer is needed" in done.stderr


@pytest.mark.parametrize("choice", ["0", "1"])
def test_a_second_call_does_nothing_and_remembers_whether_ffcv_was_left_out(bare, tmp_path, choice):
    (tmp_path / ".venv").mkdir()
    checksum = subprocess.run(["cksum"], input=(ROOT / "pyproject.toml").read_bytes(), capture_output=True).stdout
    (tmp_path / ".venv/.installed").write_text(f"{checksum.decode().strip()} ffcv={choice}")
    for env in ({}, {"FFCV": choice}):
        done = bare(**env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert bare(FFCV="1" if choice == "0" else "0", PYTHON="/bin/false").returncode != 0
    assert os.listdir(tmp_path / ".venv") == [".installed"]


def test_the_browser_of_the_tests_is_optional(bare, tmp_path):
    done = bare("tests/browser.sh")
    assert (done.returncode, done.stdout) == (0, "") and len(done.stderr.splitlines()) == 1
    assert "no apt (with root or sudo) to install it: the tests of the page will be skipped" in done.stderr
    asked = tmp_path / "asked"
    apt = tmp_path / "bin/apt-get"
    apt.write_text(f'#!/bin/sh\necho "$*" >> {asked}\ncase "$*" in *headless-shell*) exit 100;; esac\n')
    apt.chmod(0o755)
    (tmp_path / "bin/sudo").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "bin/sudo").chmod(0o755)
    (tmp_path / "bin/true").symlink_to(shutil.which("true"))
    done = bare("tests/browser.sh")
    assert done.returncode == 0 and "installing Chromium" in done.stderr
    assert [line.split()[-2] for line in asked.read_text().splitlines()[1:]] == ["chromium-headless-shell", "chromium"]
    (tmp_path / "bin/chromium").symlink_to(tmp_path / "bin/true")
    assert bare("tests/browser.sh").stderr == ""
