"""tune/search.py as a user starts it: crash, kill and resume, a trial over two nodes, mistakes."""

import csv
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from ray.cluster_utils import Cluster

from launch import run_main
from oat_dist.config_io import read_config
from tune import search

ROOT = pathlib.Path(__file__).parents[2]
# Three epochs, two lambdas, one seed: enough for a trade-off between the dedicated ends.
SHORT = ["--optim.epochs=3", "--optim.batch_size=120", "--attack.steps=2", "--attack.eps_255=51",
         "--evaluation.steps=3", "--checkpoint.interval_epochs=1", "--search.interval_epochs=1",
         "--search.grace_epochs=1", "--search.frontier_lambdas=[0, 1]", "--search.frontier_seeds=1",
         "--search.report_lambdas=3", "--search.report_seeds=1"]  # fmt: skip


@pytest.fixture(scope="module")
def settings(digits, tmp_path_factory) -> list[str]:
    """Settings of all searches here: they share a folder, and with it the dedicated networks."""
    return [*SHORT, f"--data.root={digits.folder.parent}", f"--output_dir={tmp_path_factory.mktemp('runs')}"]


def config_file(path: pathlib.Path, space: str) -> str:
    """The digits' search with another space."""
    whole = (ROOT / "tune/configs/digits.yaml").read_text()
    path.write_text(whole[: whole.index("\nspace:")] + f"\nspace: {space}\n")
    return str(path)


def command(*args: str) -> list[str]:
    return [sys.executable, "tune/search.py", *args]


def finish(args: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(args, capture_output=True, text=True, cwd=ROOT, timeout=300)


def rows(folder: pathlib.Path) -> list[dict]:
    return list(csv.DictReader((folder / "search.csv").open()))


def ray_addresses(pid: int) -> list[str]:
    """Addresses on which the processes of a local Ray cluster listen."""
    processes = [p for p in psutil.Process(pid).children(recursive=True) if p.name() in ("raylet", "gcs_server")]
    return [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]


def wait_for(folder: pathlib.Path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, f"no {pattern} was written"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.dist
def test_a_search_with_a_crash_goes_on_after_sigkill_and_reports_on_test(settings, tmp_path):
    config = config_file(tmp_path / "search.yaml", "{model.init_from: [missing.safetensors, null]}")
    args = command("--config", config, *settings, "--search.algorithm=grid")
    output = pathlib.Path(settings[-1].partition("=")[2])
    # What it says of an error is shown where the test fails.
    victim = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(output, "*_search/trials/*/*/checkpoints/step_*", victim)
        heard = ray_addresses(victim.pid)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert heard and all(address.endswith("127.0.0.1") for address in heard)
    done = finish([*args, "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = output.glob("*_search")
    by_status = {row["status"]: row for row in rows(folder)}
    assert len(rows(folder)) == 2 and by_status.keys() == {"failed", "finished"}
    assert "missing.safetensors" in by_status["failed"]["error"]
    finished = by_status["finished"]
    assert int(finished["epoch"]) == 3 and 0 <= float(finished["sa/1"]) <= 1 and float(finished["ratio"]) >= 0
    # The trial that was running went on from its checkpoint.
    assert json.loads((pathlib.Path(finished["run"]) / "provenance.json").read_text())["resumed"]
    assert len(list((folder / "trials").glob("*/*"))) == 2, "a trial began anew"
    best = read_config(folder / "best.yaml")
    assert best.evaluation.split == "test" and best.model.init_from is None and best.optim.epochs == 3
    report = json.loads((folder / "report.json").read_text())
    assert (report["split"], len(report["controls"]), len(report["runs"])) == ("test", 2, 1)
    assert [p["lam"] for p in report["conditional"]["curve"]] == [0.0, 0.5, 1.0]
    names = {"search.yaml", "frontier.json", "search.csv", "search.png", "search.svg", "best.yaml", "report.json",
             "report.csv", "report.png", "report.svg"}  # fmt: skip
    assert names <= {p.name for p in folder.iterdir()}
    assert "no unfinished search of these settings" in finish([*args, "--resume"]).stderr


@pytest.mark.slow
@pytest.mark.dist
def test_a_trial_of_two_workers_spans_two_nodes(settings, tmp_path):
    config = config_file(tmp_path / "search.yaml", "{conditioning.encoding: [fourier]}")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    try:
        nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        args = ["--config", config, *settings, "--search.algorithm=grid", "--search.report_seeds=0", "--name=two"]
        # A node has one CPU, so two workers of one CPU are on two nodes.
        done = finish(command(*args, "--address", nodes.address, "--workers-per-trial", "2"))
    finally:
        nodes.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = pathlib.Path(settings[-1].partition("=")[2]).glob("*_two_search")
    (row,) = rows(folder)
    assert row["status"] == "finished" and int(row["epoch"]) == 3
    assert json.loads((pathlib.Path(row["run"]) / "provenance.json").read_text())["ranks"] == 2
    assert [entry.split(":")[0] for entry in row["history"].split()] == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.dist
def test_without_an_address_no_other_cluster_of_the_machine_is_joined():
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    count = "import ray, tune.cluster\nwith tune.cluster.cluster(None): print('CPUs', ray.cluster_resources()['CPU'])"
    try:
        nodes.add_node(num_cpus=5, object_store_memory=100 * 2**20)
        environment = {**os.environ, "RAY_ADDRESS": nodes.address}
        done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, cwd=ROOT, timeout=120,
                              env=environment)  # fmt: skip
    finally:
        nodes.shutdown()
    assert f"CPUs {len(os.sched_getaffinity(0))}.0" in done.stdout, done.stdout + done.stderr


def start(args, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["search.py", *args])
    try:
        run_main(search.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "args", "message"),
    [("{optim.lrr: [1]}", [], "space.optim.lrr: unknown key; did you mean optim.lr?"),
     ("{conditioning.distribution: ['normal(0, 1)']}", [], "space.conditioning.distribution='normal(0, 1)': expected"),
     ("{optim.lr: [1.0]}", ["--search.trails=1"], "search.trails: unknown key; did you mean search.trials?"),
     ("{optim.lr: [1.0]}", ["--search.frontier_lambdas=[0, 0.5]"], "search.frontier_lambdas=(0.0, 0.5): must increase"),
     ("{optim.lr: [1.0]}", ["--workers-per-trial=2", "--gpus-per-worker=0.5"], "search.gpus_per_worker=0.5: a"),
     ("{optim.lr: [1.0]}", ["--resume", "nowhere"], "--resume nowhere: not a search"),
     ("{optim.lr: [1.0]}", ["--cpus-per-worker=4096"], "search.cpus_per_worker=4096 with 0 GPUs: no node has that"),
     ("{optim.lr: [1.0]}", ["--workers-per-trial=4096"], "search.workers_per_trial=4096: the cluster has room for")],
)  # fmt: skip
def test_a_mistake_costs_one_line_exit_code_2_and_writes_nothing(
    space, args, message, digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = config_file(tmp_path / "search.yaml", space)
    settings = [*SHORT, f"--data.root={digits.folder.parent}", f"--output_dir={tmp_path / 'runs'}"]
    assert start(["--config", config, *settings, "--search.algorithm=grid", *args], monkeypatch) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(f"error: {message}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_address_where_no_cluster_answers_is_refused_within_its_time(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tune.cluster.ADDRESS_TIMEOUT_S", 3)
    settings = [f"--data.root={digits.folder.parent}", f"--output_dir={tmp_path / 'runs'}"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (silent.getsockname()[1], 1):
            start_s = time.monotonic()
            assert start([*settings, "--address", f"127.0.0.1:{port}"], monkeypatch) == 2
            assert f"--address 127.0.0.1:{port}: no Ray cluster answers there" in capsys.readouterr().err
            assert time.monotonic() - start_s < 60
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_frontier_of_another_data_set_is_refused(digits, tmp_path, monkeypatch, capsys):
    other = {"dataset": "cifar10", "split": "val", "attack": {}, "data_sha256": "0", "recipe": {}, "points": []}
    (tmp_path / "frontier.json").write_text(json.dumps(other))
    settings = [f"--data.root={digits.folder.parent}", f"--output_dir={tmp_path / 'runs'}"]
    assert start([*settings, "--frontier", str(tmp_path / "frontier.json")], monkeypatch) == 2
    assert "of another dataset: cifar10 there, digits here" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["frontier.json"]
