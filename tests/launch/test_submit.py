"""Jobs: what is handed in, how names are quoted, and a real queue that takes a run away and gives it back."""

import csv
import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from launch import submit
from launch.machines import Place
from launch.slurm.queue import recorded
from launch.slurm.script import command_script, search_script, training_script
from launch.slurm.status import status
from oat_dist.errors import UserError
from tests.launch.commands import ROOT, STEPS, only_run, require_same, run, steps_done, wait_for
from tests.slurm_cluster import slurm_cluster, why_not
from tests.tune.test_search import SHORT as SHORT_SEARCH
from tests.tune.test_search import config_file

PLACE = Place(nodes=2, gpus_per_node=0, processes_per_node=1)
needs_slurm = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def error(*args: str) -> str:
    with pytest.raises(UserError) as raised:
        submit.main(args)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_dry_run_shows_the_whole_job_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--nodes", "2", "--gpus-per-node", "8", "--time", "4:00:00", "--partition", "gpu", "--dry-run"]
    submit.main([*args, "--config", str(ROOT / "launch/configs/digits.yaml")])
    command, _, script = capsys.readouterr().out.partition("\n")
    for option in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=4:00:00", "--partition=gpu",
                   "--requeue", "--signal=USR1@120"):  # fmt: skip
        assert option in shlex.split(command)
    assert "launch/train.py" in script and "scontrol requeue" in script
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["$(touch x)", "`touch x`", "a b;touch x", "it's", 'a"$(touch x)"', "\\$(touch x)\\"])
@pytest.mark.parametrize("make", ["train", "frontier", "search", "search on two"])
def test_a_name_is_never_run_by_the_shell(tmp_path, name, make):
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for program in ("scontrol", "squeue", "srun", "getent", "env"):  # what the script calls, doing nothing
        (fakes / program).write_text(f'#!/bin/sh\nprintf "%s\\n" "$0" "$@" >> {tmp_path}/said\n')
        (fakes / program).chmod(0o755)
    place = PLACE if make.endswith("two") else Place(nodes=1, gpus_per_node=0, processes_per_node=1)
    script = {
        "train": lambda: training_script([pathlib.Path(name)], place),
        "frontier": lambda: command_script("launch/frontier.py", ["--output_dir", name], place),
        "search": lambda: search_script(["--output_dir", name], place),
        "search on two": lambda: search_script(["--output_dir", name], place),
    }[make]()
    script = script.replace(f"until {sys.executable}", "until true")  # there is no cluster to wait for
    env = {"PATH": f"{fakes}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"}
    done = subprocess.run(["bash", "-c", f"cd() {{ :; }}; {script}"], cwd=tmp_path, env=env, timeout=30)
    assert done.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "said"], "nothing was touched"
    assert name in (line.partition("=")[2] or line for line in (tmp_path / "said").read_text().splitlines()) or any(
        line.startswith(name) for line in (tmp_path / "said").read_text().splitlines()
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--nodes", "2", "--gpus-per-node", "3"],
      "optim.batch_size=128: 2 nodes x 3 GPUs = 6 do not divide it; 4 and 8 processes do, or optim.batch_size=126 "
      "and 132 with these"),
     (["--nodes", "300"], "optim.batch_size=128: 300 nodes x 1 processes = 300 do not divide it; 128 processes do, or "
      "optim.batch_size=300 with these"),
     (["--nodes", "0"], "--nodes=0: must be at least 1"),
     (["--gpus-per-node", "2", "--processes-per-node", "1"], "--processes-per-node=1: with GPUs there is one process"),
     (["--time", "soon"], "--time='soon': must be minutes, MM:SS, H:MM:SS"),
     (["--name=$(touch x)"], "name='$(touch x)': must be letters, digits and -_.+ only"),
     (["--array-lambdas", "0", "0.5"], "--array-lambdas=(0.0, 0.5): must lie in [0, 1] and have both ends"),
     (["--optim.lrr=1"], "optim.lrr: unknown key; did you mean optim.lr?"),
     (["--status", "nowhere"], "--status nowhere: not a run")],
)  # fmt: skip
def test_a_mistake_is_named_before_anything_is_written(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error(*args, "--dry-run").startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_without_a_queue_one_line_says_so_and_the_run_folder_is_gone_again(short, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert error(*short, f"--output_dir={tmp_path / 'runs'}").startswith("sbatch: not found")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.fixture(scope="module")
def started_cluster(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield env["SLURM_CONF"]


@pytest.fixture
def cluster(started_cluster, monkeypatch):
    """This process, and what it starts, hand jobs in to the cluster."""
    monkeypatch.setenv("SLURM_CONF", started_cluster)
    monkeypatch.chdir(ROOT)


def state(job: str) -> str:
    """Of a job; as the queue has it."""
    return run("scontrol", "-o", "show", "job", job).stdout.partition("JobState=")[2].partition(" ")[0]


def restarts(job: str) -> int:
    """How often a job went back into the queue."""
    return int(run("scontrol", "-o", "show", "job", job).stdout.partition("Restarts=")[2].partition(" ")[0] or 0)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("cluster")
@needs_slurm
def test_a_job_that_is_sent_back_into_the_queue_twice_ends_as_an_undisturbed_run(short, two_processes, tmp_path):
    folder = tmp_path / "$(touch x) and ü"
    args = [*short, f"--output_dir={folder}", "--nodes", "2", "--time", "60"]
    submit.main(args)
    mine = only_run(folder)
    job = recorded(mine / "slurm")
    assert error(*args).startswith(f"{mine}: job {job}: ")

    for times, step in ((1, 3), (2, 8)):
        wait_for(lambda step=step: steps_done(folder) >= step, 180, "no steps")
        # As before a time limit, then as an administrator who takes the nodes away.
        stop = ["scancel", "--signal=USR1", job] if times == 1 else ["scontrol", "requeue", job]
        assert run(*stop).returncode == 0
        # Not its state: a loaded machine may start it again between two looks.
        wait_for(lambda times=times: restarts(job) >= times, 180, "the job does not return to the queue")

        def last_checkpoint() -> list[pathlib.Path]:
            return list((mine / "checkpoints").glob(f"step_{steps_done(folder):08d}*"))

        # Its ranks may still be on their way out.
        wait_for(last_checkpoint, 60, "no checkpoint of its last step")
        at = steps_done(folder)
        assert step <= at < STEPS, "it stopped on the way"
        assert f"job {job}: " in status(mine) and f"step {at} of {STEPS}" in status(mine)
        wait_for(lambda: state(job) != "PENDING", 180, "the job does not start again")
    wait_for(lambda: state(job) in ("COMPLETED", "FAILED"), 180, "the job does not end")
    (log,) = (mine / "slurm").glob("log_*.txt")
    assert state(job) == "COMPLETED", log.read_text()
    require_same(mine, two_processes)
    assert len(json.loads((mine / "provenance.json").read_text())["resumed"]) == 3
    assert "finished" in status(mine)
    assert not list(tmp_path.rglob("x")) and not os.path.exists(ROOT / "x")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("cluster")
@needs_slurm
def test_a_search_over_two_nodes_ends_on_a_ray_cluster_of_the_job(digits, tmp_path):
    config = config_file(tmp_path / "search.yaml", "{conditioning.encoding: [fourier]}")
    args = ["--search", "--config", config, *SHORT_SEARCH, f"--data.root={digits.folder.parent}", "--name=two",
            f"--output_dir={tmp_path}", "--search.algorithm=grid", "--search.report_seeds=0"]  # fmt: skip
    submit.main([*args, "--nodes", "2", "--time", "60"])
    (job,) = run("squeue", "--noheader", "--format=%A").stdout.split()
    wait_for(lambda: state(job) in ("COMPLETED", "FAILED"), 300, "the job does not end")
    (log,) = (tmp_path / "two_search_slurm").glob("log_*.txt")
    assert state(job) == "COMPLETED", log.read_text()
    assert log.read_text().count("Ray runtime started") == 2, "one node of the cluster on each"
    (table,) = tmp_path.glob("*_two_search/search.csv")
    (row,) = csv.DictReader(table.open())
    assert row["status"] == "finished" and int(row["epoch"]) == 3


@pytest.mark.usefixtures("cluster")
@needs_slurm
@pytest.mark.parametrize(
    ("args", "said"),
    [(["--partition", "nowhere"], "invalid partition"), (["--nodes", "4"], "Node count specification")],
)
def test_a_queue_that_rejects_a_job_costs_one_line_and_leaves_no_run(short, tmp_path, args, said):
    message = error(*short, f"--output_dir={tmp_path}", *args)
    assert message.startswith("sbatch: the queue rejects the job: ") and said in message
    assert list(tmp_path.iterdir()) == []
