"""The entry scripts as a user starts them: what they write, that they repeat, that mistakes cost one line."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from launch import evaluate, prepare_data, run_main, train

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = ["--config", "launch/configs/digits.yaml"]
# A low learning rate, so that ten steps do not multiply float32 rounding beyond the tolerance of the comparisons.
SHORT = ["--optim.epochs=2", "--optim.lr=0.02", "--optim.batch_size=240", "--attack.steps=2", "--evaluation.steps=2"]


def command(*args: str, launcher: tuple[str, ...] = (), cwd=ROOT) -> subprocess.CompletedProcess:
    """Run an entry script with the launcher, or by this Python, without colours and terminal."""
    env = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    start = launcher or (sys.executable,)
    return subprocess.run([*start, *args], capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


def only_run(folder: pathlib.Path) -> pathlib.Path:
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def single(digits, tmp_path_factory) -> tuple[pathlib.Path, subprocess.CompletedProcess, list[str]]:
    """A short run in one process, its output, and its settings."""
    settings = [*SHORT, f"--data.root={digits.folder.parent}", "--logging.interval_steps=1"]
    folder = tmp_path_factory.mktemp("single")
    done = command("launch/train.py", *DIGITS, *settings, f"--output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return only_run(folder), done, settings


@pytest.mark.slow
def test_training_writes_a_complete_run_and_prints_the_curve_and_where_it_is(single):
    run, done, _ = single
    expected = {"config.yaml", "deepspeed.json", "provenance.json", "metrics.jsonl", "timings.jsonl", "tensorboard",
                "model.safetensors", "frontier.json", "frontier.png", "frontier.svg", "checkpoints",
                "frontier.images.safetensors", "report.html", ".lock"}  # fmt: skip
    assert {p.name for p in run.iterdir()} == expected
    frontier = json.loads((run / "frontier.json").read_text())
    assert (frontier["model"], frontier["dataset"], frontier["split"]) == ("resnet8", "digits", "test")
    assert frontier["num_examples"] == 180 and frontier["attack"]["eps"] == pytest.approx(0.3)
    assert [p["lam"] for p in frontier["points"]] == [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]
    assert all(0 <= p["ra"] <= p["sa"] <= 1 for p in frontier["points"])
    for text in ("lambda", "SA %", "RA %", str(run / "frontier.json"), str(run / "frontier.png")):
        assert text in done.stdout
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == str(run / "report.html")


@pytest.mark.slow
def test_the_metrics_have_every_step_and_the_schedule(single):
    run, _, _ = single
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["lr"] < lines[4]["lr"]
    for line in lines:
        # One image in six has lambda 0; a loss is the mean of (1 - lambda) * clean + lambda * robust.
        assert 0 < line["loss"] < line["loss_clean"] + line["loss_robust"]
        assert 0 <= line["accuracy_robust"] <= 1


@pytest.mark.slow
@pytest.mark.dist
def test_the_deepspeed_launcher_repeats_a_run_to_the_last_bit(single, tmp_path):
    run, _, settings = single
    args = ["launch/train.py", *DIGITS, *settings, f"--output_dir={tmp_path}"]
    done = command("--num_accelerators", "1", *args, launcher=("deepspeed",))
    assert done.returncode == 0, done.stdout + done.stderr
    again = only_run(tmp_path)
    for name in ("metrics.jsonl", "frontier.json", "model.safetensors"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), f"{name} differs"


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_under_the_launcher_make_one_run_with_the_loss_of_one_process(single, tmp_path):
    run, _, settings = single
    args = ["launch/train.py", *DIGITS, *settings, "--engine.sync_statistics=true", f"--output_dir={tmp_path}"]
    done = command("--num_accelerators", "2", *args, launcher=("deepspeed",))
    assert done.returncode == 0, done.stdout + done.stderr
    shared = only_run(tmp_path)
    assert json.loads((shared / "provenance.json").read_text())["ranks"] == 2
    lines = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, shared)]
    assert len(lines[1]) == 10
    alone, both = ([line["loss"] for line in each] for each in lines)
    assert both[0] == pytest.approx(alone[0], rel=1e-4)
    # The number of threads differs too. A gradient sign that rounding turns is a jump, so later steps agree less;
    # tests/oat_dist/test_ranks.py shows 1e-3 at equal threads and 1e-9 in float64.
    assert both == pytest.approx(alone, rel=1e-2)


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_killed_by_sigkill_goes_on_by_the_same_command_and_ends_bit_identical(single, tmp_path):
    run, _, settings = single
    args = ["launch/train.py", *DIGITS, *settings, f"--output_dir={tmp_path}"]
    victim = subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*/checkpoints/step_*")):
            assert victim.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.01)
    finally:
        victim.kill()
        victim.wait()
    killed = only_run(tmp_path)
    assert not (killed / "frontier.json").exists()
    done = command(*args)
    assert done.returncode == 0, done.stderr
    assert only_run(tmp_path) == killed and f"going on with {killed} at step" in done.stdout
    for name in ("metrics.jsonl", "frontier.json", "model.safetensors"):
        assert (killed / name).read_bytes() == (run / name).read_bytes(), f"{name} differs"
    (resumed,) = json.loads((killed / "provenance.json").read_text())["resumed"]
    assert resumed["step"] in (5, 10)


def start(main, args, monkeypatch) -> int:
    """Run an entry script's main in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["script", "--local_rank=0", *args])
    try:
        run_main(main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.slow
def test_evaluating_a_run_agrees_with_its_frontier_and_overwrites_nothing(single, monkeypatch, capsys):
    run, _, _ = single
    args = ["--run", str(run), "--attack", "pgd", "--steps", "2"]
    assert start(evaluate.main, [*args, "--lambdas", "0", "0.05", "1"], monkeypatch) == 0
    path = run / "eval/test_pgd-2_linf_eps76.5.json"
    measured, trained = (json.loads(p.read_text()) for p in (path, run / "frontier.json"))
    assert measured["attack"] == trained["attack"]
    ends = {p["lam"]: p for p in trained["points"]}
    assert [p for p in measured["points"] if p["lam"] != 0.05] == [ends[0.0], ends[1.0]]
    printed = capsys.readouterr().out
    assert "0.05" in printed and str(path) in printed

    before = path.read_bytes()
    other = ["--lambdas", "1", "--eps-255", "76.5", "--loader", "memory", "--batch-size", "50"]
    assert start(evaluate.main, [*args, *other], monkeypatch) == 0
    second = json.loads((run / "eval/test_pgd-2_linf_eps76.5-2.json").read_text())
    assert second["points"] == [ends[1.0]]
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [(["--lambdas", "1.5"], "--lambdas=(1.5,): every lambda must lie in [0, 1]"),
     (["--lambdas", "-0.1", "1"], "--lambdas=(-0.1, 1.0): every lambda must lie in [0, 1]"),
     (["--steps", "0"], "--steps=0: must be at least 1"),
     (["--eps-255", "-8"], "--eps-255=-8.0: must be at least 0"),
     (["--step-size-255", "0"], "--step-size-255=0.0: must be > 0"),
     (["--split", "all"], "argument --split: invalid choice: 'all'"),
     (["--data-root", "nowhere"], "data.dataset='digits': no prepared data set at nowhere/digits")],
)  # fmt: skip
def test_a_mistake_in_an_evaluation_is_named(single, args, message, monkeypatch, capsys):
    run, _, _ = single
    before = sorted(run.rglob("*"))
    assert start(evaluate.main, ["--run", str(run), *args], monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("main", "args", "message"),
    [(train.main, ["--optim.lrr=1"], "optim.lrr: unknown key; did you mean optim.lr?"),
     (train.main, ["--config", "missing.yaml"], "--config missing.yaml: No such file"),
     (evaluate.main, ["--run", "nowhere"], "--run nowhere: not a run"),
     (evaluate.main, [], "the following arguments are required: --run"),
     (prepare_data.main, ["imagenet"], "data set 'imagenet': expected one of digits, cifar10")],
)  # fmt: skip
def test_a_mistake_on_the_command_line_costs_one_line_and_exit_code_2(
    main, args, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    assert start(main, args, monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [("--data.dataset=cifar", "data.dataset='cifar': no prepared data set at "),
     ("--optim.batch_size=5000", "optim.batch_size=5000: must be at most the 1437 training images"),
     ("--output_dir=file/runs", "output_dir='file/runs': cannot write a run")],
)  # fmt: skip
def test_a_mistake_found_in_the_data_costs_one_line_exit_code_2_and_writes_nothing(setting, message, tmp_path, digits):
    (tmp_path / "file").write_text("")
    done = command(str(ROOT / "launch/train.py"), setting, f"--data.root={digits.folder.parent}", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {message}")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_costs_one_line_and_exit_code_2_and_leaves_no_model(tmp_path, digits):
    settings = [*SHORT, f"--data.root={digits.folder.parent}", "--optim.lr=1e38", f"--output_dir={tmp_path}"]
    done = command("launch/train.py", *DIGITS, *settings)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert errors[0].startswith("error: loss is not finite at step 2 for ")
    assert "by lambda 0: " in errors[0] and "last good checkpoint: none yet" in errors[0]
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EPIPE, None)], ids=["full", "read-only", "another"]
)
def test_a_disk_without_room_costs_one_line_and_other_faults_keep_their_traceback(number, code, monkeypatch, capsys):
    def main(argv):
        raise OSError(number, os.strerror(number), "runs/x/metrics.jsonl")

    if code is None:
        with pytest.raises(OSError, match="Broken pipe"):
            start(main, [], monkeypatch)
    else:
        assert start(main, [], monkeypatch) == code
        said = capsys.readouterr().err
        assert (
            said.startswith(f"error: runs/x/metrics.jsonl: {os.strerror(number)}; make room") and said.count("\n") == 1
        )


def test_preparing_data_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    assert start(prepare_data.main, ["digits", "--out", str(tmp_path)], monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "1437 train, 180 val, 180 test" in printed
    names = {p.name for p in (tmp_path / "digits").iterdir()}
    assert {"dataset.json", "train.safetensors", "val.safetensors", "test.safetensors"} <= names
    assert not any(name.startswith(".") for name in names)


@pytest.mark.slow
@pytest.mark.dist
def test_a_mistake_found_by_the_ranks_is_said_once_under_the_launcher(tmp_path, digits):
    args = ["launch/train.py", *DIGITS, "--optim.batch_size=1", f"--data.root={digits.folder.parent}"]
    done = command("--num_accelerators", "2", *args, f"--output_dir={tmp_path}", launcher=("deepspeed",))
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: optim.batch_size=1: must be at least ranks x")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
