"""The GPU check runs its stages one by one, whatever becomes of them; no stage of its own runs here."""

import csv
import json
import subprocess
import sys
import time

import gpu_check
import pytest
import torch
from gpu_check import Stage, build_stages, run_stages, summary

from oat_dist.config_io import load_config

NOTHING = ["-c", "pass"]


def stage(name, command, limit_s=20, **more) -> Stage:
    return Stage(name=name, commands=lambda _: [command], limit_s=limit_s, **more)


def test_a_stage_that_fails_or_hangs_stops_no_other(tmp_path, capfd):
    stages = [
        stage("good", NOTHING, figures=lambda: "7 of 7"),
        stage("bad", ["-c", "import sys; print('what went wrong'); sys.exit(3)"]),
        stage("hanging", ["-c", "import time; time.sleep(60)"], limit_s=1),
        stage("mute", NOTHING, figures=lambda: next(iter(()))),
        stage("absent", NOTHING, skip="no images"),
        stage("last", NOTHING),
    ]
    outcomes = run_stages(stages, tmp_path, 60)
    assert [o.result for o in outcomes] == [
        "passed", "failed: exit 3", "stopped after 1 s", "failed: no figures (StopIteration: )",
        "not run: no images", "passed",
    ]  # fmt: skip
    assert [o.failed for o in outcomes] == [False, True, True, True, False, False]
    assert "what went wrong" in capfd.readouterr().out
    assert "| good | passed | 0 | 7 of 7 |" in summary(outcomes)


def test_a_stage_that_is_stopped_shows_what_it_had_measured_and_the_table_so_far_is_on_disk(tmp_path):
    stages = [
        stage("slow", ["-c", "import time; time.sleep(60)"], limit_s=1, figures=lambda: "half of it"),
        stage("reader", ["-c", f"assert 'half of it' in open({str(tmp_path / 'summary.md')!r}).read()"]),
    ]
    slow, reader = run_stages(stages, tmp_path, 60)
    assert (slow.result, slow.figures) == ("stopped after 1 s", "half of it") and slow.failed
    assert reader.result == "passed"


def test_the_tests_of_a_gpu_are_found_without_the_packages_that_others_import():
    missing = ("ray", "optuna", "pyautoattack", "ffcv", "wandb", "foolbox")
    command = gpu_check._tests()
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); import pytest\n"
    program += f"sys.exit(pytest.main({[*command[2:], '--collect-only', '--continue-on-collection-errors']}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    for name in ("test_on_gpu", "test_forward", "test_graphed", "test_step"):
        assert f"{name}.py::" in done.stdout


def test_a_hanging_stage_takes_its_children_with_it(tmp_path):
    marker = tmp_path / "still there"
    child = f"import pathlib, time; time.sleep(2.5); pathlib.Path({str(marker)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    run_stages([stage("hanging", ["-c", parent], limit_s=1)], tmp_path, 60)
    time.sleep(2.5)
    assert not marker.exists()


def test_what_no_time_is_left_for_counts_as_failed(tmp_path):
    (outcome,) = run_stages([stage("late", NOTHING)], tmp_path, 0)
    assert outcome.result == "not run: no time left" and outcome.failed


def test_a_comparison_that_is_cut_off_does_not_count_but_one_that_breaks_does(tmp_path):
    stages = [
        stage("slow", ["-c", "import time; time.sleep(60)"], limit_s=1, may_be_cut=True),
        stage("bad", ["-c", "raise SystemExit(1)"], may_be_cut=True),
    ]
    outcomes = run_stages(stages, tmp_path, 60)
    assert [o.result for o in outcomes] == ["stopped after 1 s", "failed: exit 1"]
    assert [o.failed for o in outcomes] == [False, True]
    (late,) = run_stages([stage("late", NOTHING, may_be_cut=True)], tmp_path, 0)
    assert late.result == "not run: no time left" and not late.failed


def test_without_images_the_training_stage_says_what_to_give(tmp_path):
    skips = {s.name: s.skip for s in build_stages(None, tmp_path)}
    assert skips.pop("training") == "no images; give --images FOLDER or set OAT_GPU_CHECK_IMAGES"
    assert not any(skips.values())


@pytest.mark.parametrize("speed, model, epochs", [(None, "wrn10_2", 1), ("100", "wrn10_2", 1), ("2400", "resnet34", 4)])
def test_the_training_lasts_as_long_as_the_measured_speed_allows(speed, model, epochs, tmp_path):
    step = tmp_path / "step.csv"
    if speed:
        write(step, [{"arrangement": "ours", "images_per_s": speed}])
    prepare, (script, *arguments) = gpu_check._training_commands(tmp_path / "images", tmp_path, step, 180)
    assert prepare[:2] == ["launch/prepare_data.py", f"folder:{tmp_path}/images"] and script == "launch/train.py"
    config = load_config(arguments)
    assert (config.model.name, config.optim.epochs) == (model, epochs)
    assert config.data.loader == "memory" and config.engine.precision == "bf16"


def test_figures_come_with_what_is_asked_of_them(tmp_path):
    operators, step = tmp_path / "operators.csv", tmp_path / "step.csv"
    usual = {"network": "resnet34", "operator": "modulate", "way": "both", "share_of_copy": "0.9"}
    ratios = {"eager_over_ours": "3.21", "compile_over_ours": ""}
    write(operators, [usual | ratios | {"channels": "64"}, usual | ratios | {"channels": ""}])
    assert gpu_check._operator_figures(operators) == "resnet34 modulate: 0.90 of copy (asked: 0.85), eager / ours 3.21"
    row = {"arrangement": "ours", "images_per_s": "9", "time_over_ours_median": "1.0", "peak_mib": "5"}
    write(step, [row | {"reserved_mib": "6", "cost_ratio_median": "6.1"}])
    assert gpu_check._step_figures(step).endswith("peak 5 MiB, reserved 6 MiB; cost ratio 6.1 (asked: at most 6.58)")


def test_accuracies_are_read_from_the_newest_run(tmp_path):
    run = tmp_path / "1_gpu-check"
    run.mkdir()
    (run / "frontier.json").write_text(json.dumps({"points": [{"lam": 1.0, "sa": 0.5, "ra": 0.25}]}))
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0}\n{"step": 2, "epoch": 1}\n')
    assert gpu_check._training_figures(tmp_path) == "2 epochs; lambda 1: SA 50.0, RA 25.0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, gpu_check.__file__], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gpu-check: torch finds no NVIDIA GPU here; nothing was checked\n"


def write(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
