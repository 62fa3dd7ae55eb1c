"""launch/evaluate.py as a user starts it: every option, a kill, and what it refuses."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from launch import evaluate, run_main
from oat_dist import runs
from oat_dist.config import AttackConfig, Config, DataConfig
from oat_dist.data import open_prepared
from oat_dist.data.checksum import file_sha256
from oat_dist.weights import read_tensors
from tests.oat_dist.evaluation.networks import perturbed_network

ROOT = pathlib.Path(__file__).parents[2]


def change_data(folder: pathlib.Path, **about) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> pathlib.Path:
    """A run whose network was not trained, on data whose labels are mostly what it answers at lambda 0.3."""
    root = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(digits.folder, root / "digits")
    network, sums = perturbed_network(), {}
    for split in ("train", "val", "test"):
        path = root / f"digits/{split}.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors["label"] = network.predict(tensors["image"].permute(0, 3, 1, 2) / 255, 0.3).argmax(1)
        tensors["label"][::10] = 0
        safetensors.torch.save_file(tensors, path)
        sums[path.name] = file_sha256(path)
    change_data(root / "digits", sha256=sums)
    config = Config(
        data=DataConfig(loader="memory", root=str(root)),
        attack=AttackConfig(eps_255=5.1),
        output_dir=str(root / "runs"),
    )
    data = open_prepared(str(root), "digits")
    folder = runs.create_run(config, data, {}, 1)
    runs.save_model(network, data, folder / "model.safetensors")
    (folder / "frontier.json").write_text(json.dumps({"split": "none", "points": []}))
    return folder


def start(args, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    try:
        run_main(evaluate.main)
    except SystemExit as stop:
        return stop.code
    return 0


def test_several_attacks_a_matrix_and_random_lambda_in_one_report(run, monkeypatch, capsys):
    args = ["--run", run, "--attack", "pgd-3", "square-5", "--lambdas", "0", "0.3", "--attack-lambdas",
            "--random-lambda", "2", "--num-images", "60"]  # fmt: skip
    assert start(args, monkeypatch) == 0
    stem = run / "eval/test_pgd-3+square-5_linf_eps5.1"
    report = json.loads(stem.with_name(stem.name + ".json").read_text())
    assert report["num_examples"] == 60 and [p["lam"] for p in report["points"]] == [0.0, 0.3]
    for point in report["points"]:
        assert 0 <= point["ra_worst"] <= point["ra"] <= point["ra_after"]["pgd-3"] <= point["sa"]
        assert point["ra_after"]["square-5"] == point["ra"] and point["ra_ci"][0] <= point["ra"] <= point["ra_ci"][1]
    matrix = report["matrix"]
    assert [matrix["ra"][at][at] for at in (0, 1)] == [p["ra"] for p in report["points"]]
    assert report["random_lambda"]["ra"] <= report["random_lambda"]["sa"]
    assert report["checks"][0]["check"] == "stochastic output"
    assert report["confidence"]["level"] == 0.95 and report["attack"]["attacks"][1]["source"] == "pyautoattack"
    tensors, about = read_tensors(stem.with_name(stem.name + ".images.safetensors"))
    assert tensors["code"].shape == (5, 60) and about["cells"][-1] == {"lam": None, "via": None}
    assert ((tensors["code"][1] == -1).double().mean().item()) == report["points"][1]["ra"]
    assert {path.name for path in stem.parent.iterdir()} == {
        stem.name + suffix for suffix in (".json", ".png", ".svg", ".images.safetensors")
    }
    printed = capsys.readouterr().out
    assert "worst lambda" in printed and "random" in printed and "[" in printed


@pytest.mark.parametrize(("key", "target"), [("sa", 0.6), ("ra", 0.5)])
def test_a_lambda_chosen_on_validation_is_reported_on_test(run, key, target, monkeypatch):
    args = ["--run", run, "--attack", "cw-2", f"--target-{key}", target, "--lambdas", "0", "0.2", "0.3", "1"]
    before = set((run / "eval").glob("*")) if (run / "eval").exists() else set()
    assert start(args, monkeypatch) == 0
    (path,) = [p for p in set((run / "eval").glob("test_cw-2*.json")) - before]
    report = json.loads(path.read_text())
    chosen = report["chosen"]
    assert chosen["target"] == {key: target} and chosen["split"] == "val" and chosen[key] >= target
    other = {"sa": "ra", "ra": "sa"}[key]
    assert chosen[other] == max(p[other] for p in chosen["points"] if p[key] >= target)
    assert [p["lam"] for p in report["points"]] == [chosen["lam"]] and report["split"] == "test"


def test_a_target_out_of_reach_costs_one_line(run, monkeypatch, capsys):
    args = ["--run", run, "--attack", "pgd-1", "--target-sa", "0.999", "--lambdas", "0", "1"]
    assert start(args, monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: --target-sa=0.999: not reached on the validation split; the ")


@pytest.mark.slow
def test_an_evaluation_killed_by_sigkill_goes_on_by_the_same_command_and_ends_the_same(run, monkeypatch, tmp_path):
    for name in ("killed", "undisturbed"):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("eval"))
    args = ["--attack", "pgd-5", "square-20", "--lambdas", "0", "0.1", "0.3", "1", "--batch-size", "60"]
    command = [sys.executable, "launch/evaluate.py", "--run", str(tmp_path / "killed"), *args]
    victim = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while sum(len(p.read_text().split()) for p in tmp_path.glob("killed/eval/unfinished_*")) < 12:
            assert victim.poll() is None and time.monotonic() < deadline, "nothing was written down"
            time.sleep(0.01)
    finally:
        victim.kill()
        victim.wait()
    assert not list(tmp_path.glob("killed/eval/*.json")) and list(tmp_path.glob("killed/eval/unfinished_*"))
    for name in ("killed", "undisturbed"):
        assert start(["--run", tmp_path / name, *args], monkeypatch) == 0
    files = [sorted(p.name for p in (tmp_path / name / "eval").iterdir()) for name in ("killed", "undisturbed")]
    assert files[0] == files[1] and len(files[0]) == 4
    for name in files[0]:
        if name.endswith((".json", ".safetensors")):
            assert (tmp_path / "killed/eval" / name).read_bytes() == (tmp_path / "undisturbed/eval" / name).read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--attack", "fgsm-1"], "--attack=fgsm-1: unknown; expected pgd-STEPS"),
     (["--attack", "pgd-20", "--norm", "l1"], "--attack=pgd-20: is not defined in l1; l1 is offered by autoattack"),
     (["--norm", "l7"], "--norm='l7': must be one of"),
     (["--attack-lambdas", "1.5"], "--attack-lambdas=(1.5,): every lambda must lie in [0, 1]"),
     (["--lambdas", "nan"], "--lambdas=(nan,): every lambda must lie in [0, 1]"),
     (["--target-sa", "90"], "--target-sa=90.0: must lie in [0, 1]"),
     (["--target-sa", "0.9", "--target-ra", "0.4"], "--target-sa=0.9: cannot be together with --target-ra"),
     (["--target-ra", "0.4", "--split", "val"], "--split='val': lambda is chosen on val"),
     (["--num-images", "0"], "--num-images=0: must be at least 1"),
     (["--dataset", "cifar10"], "data.dataset='cifar10': no prepared data set")],
)  # fmt: skip
def test_a_mistake_is_named_before_anything_is_computed(run, args, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    before = sorted(run.rglob("*"))
    assert start(["--run", run, *args], monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("about", "message"),
    [({"classes": list("abcd")}, "4 classes there, 10 in the network"),
     ({"image_shape": [16, 16, 1]}, "images of 16x16x1 there, the network was trained on 8x8x1")],
)  # fmt: skip
def test_other_images_or_classes_are_refused(run, about, message, tmp_path, monkeypatch, capsys):
    source = run.parents[1] / "digits"
    shutil.copytree(source, tmp_path / "digits")
    change_data(tmp_path / "digits", **about)
    assert start(["--run", run, "--data-root", tmp_path], monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --run {run}: its network cannot be measured on {tmp_path}/digits: {message}")


def test_an_incomplete_run_and_a_place_that_cannot_be_written_are_named(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    (tmp_path / "run/eval").write_text("")
    assert start(["--run", tmp_path / "run", "--attack", "pgd-1"], monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/run/eval: cannot be made: ")
    (tmp_path / "run/eval").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # to the superuser nothing is forbidden
        assert start(["--run", tmp_path / "run", "--target-sa", "0.1"], patch) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/run/eval: cannot be written; ")
    (tmp_path / "run/model.safetensors").unlink()
    assert start(["--run", tmp_path / "run"], monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"error: --run {tmp_path}/run: has no model.safetensors; ")
