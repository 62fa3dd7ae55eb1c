"""All that needs a GPU, in one command of less than ten minutes: tests, operators, a step, a short training.

    make gpu-check                       or: python benchmarks/gpu_check.py [--images FOLDER] [--out FOLDER]

Needs one NVIDIA GPU and an installation; no network, no FFCV. FOLDER/train/<class>/*.jpg and FOLDER/test/<class>/*.jpg
are CIFAR-10 as images (or the environment variable OAT_GPU_CHECK_IMAGES); without them nothing is trained. Every stage
is a process of its own with a time limit, and one that fails does not stop the others. Logs, CSV files and the table so
far are kept in --out. The last thing printed is that table: stages, results and figures, with what is asked of a figure
beside it; a stage that was stopped or failed shows the figures it had written by then.

Exit code: 0 when every stage that ran passed, 1 when one failed or did not get done in its time (the comparisons with
torch.compile, which come last, may be cut off), 2 without a GPU.
"""

import argparse
import csv
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from table import markdown

ROOT = pathlib.Path(__file__).parents[1]
IMAGES_VARIABLE = "OAT_GPU_CHECK_IMAGES"
_TRAINING_S = 180
# Share of it that goes to decoding images, starting, capturing and evaluation.
_TRAINING_OVERHEAD = 0.55
_CIFAR_TRAIN_IMAGES = 45_000
_MAX_EPOCHS = 15
_TEST_PROCESSES = 8
_MARKED = re.compile(r"^(@|pytestmark = )pytest\.mark\.gpu$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One thing to check."""

    name: str
    """What the table calls it."""
    commands: Callable[[float], Sequence[Sequence[str]]]
    """From the seconds that are left for the stage: arguments of python, one list per process."""
    limit_s: float
    """Seconds for all of them."""
    figures: Callable[[], str] = lambda: ""
    """What to tell of a stage that passed."""
    may_be_cut: bool = False
    """Whether it is no failure that its time is up before it ends."""
    skip: str = ""
    """Why it is not run, if it is not."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a stage."""

    name: str
    """The stage."""
    result: str
    """"passed", or what happened instead."""
    seconds: float
    """How long it took."""
    figures: str = ""
    """What was measured."""
    failed: bool = False
    """Whether it counts against the whole."""


def run_stages(stages: Sequence[Stage], out: pathlib.Path, budget_s: float) -> list[Outcome]:
    """Run stages one after another; each has its own limit and what is left of the whole.

    Args:
        stages: In this order.
        out: Folder of the logs.
        budget_s: Seconds for everything; the table so far is in `out` should somebody else end it before.
    """
    deadline, outcomes = time.monotonic() + budget_s, []
    for stage in stages:
        left = min(stage.limit_s, deadline - time.monotonic())
        if stage.skip:
            outcomes.append(Outcome(name=stage.name, result=f"not run: {stage.skip}", seconds=0))
        elif left < 1:
            outcomes.append(
                Outcome(name=stage.name, result="not run: no time left", seconds=0, failed=not stage.may_be_cut)
            )
        else:
            print(f"{stage.name}: at most {left:.0f} s ...", flush=True)
            outcomes.append(_run(stage, out / f"{stage.name.replace(' ', '_')}.log", left))
            print(f"{stage.name}: {outcomes[-1].result}", flush=True)
        (out / "summary.md").write_text(summary(outcomes) + "\n")
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table that is printed last."""
    return markdown(
        [{"stage": o.name, "result": o.result, "s": round(o.seconds), "figures": o.figures} for o in outcomes]
    )


def _run(stage: Stage, log: pathlib.Path, limit_s: float) -> Outcome:
    start = time.monotonic()
    result, figures = "passed", ""
    with log.open("w") as stream:
        for command in stage.commands(limit_s):
            left = limit_s - (time.monotonic() - start)
            result = _run_process([sys.executable, *command], stream, max(left, 0.1), limit_s)
            if result != "passed":
                break
    try:
        figures = stage.figures()
    except (OSError, KeyError, ValueError, IndexError, StopIteration) as error:
        if result == "passed":
            result = f"failed: no figures ({type(error).__name__}: {error})"
    if result != "passed":
        print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:]), flush=True)
    failed = result.startswith("failed") or (result.startswith("stopped") and not stage.may_be_cut)
    return Outcome(name=stage.name, result=result, seconds=time.monotonic() - start, figures=figures, failed=failed)


def _run_process(command: Sequence[str], stream, left_s: float, limit_s: float) -> str:
    """Run a process in a group of its own, so that its children end with it when its time is up."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The tests interpret kernels unless told not to.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout=left_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {limit_s:.0f} s"
    return "passed" if code == 0 else f"failed: exit {code}"


def build_stages(images: pathlib.Path | None, out: pathlib.Path) -> list[Stage]:
    """The stages, the slow compilations of what ours is compared with last."""
    operators, step = out / "film_dual_bn.csv", out / "train_step_resnet34.csv"
    compiled_operators, compiled_step = out / "film_dual_bn_compiled.csv", out / "train_step_resnet34_compiled.csv"
    skip = "" if images else f"no images; give --images FOLDER or set {IMAGES_VARIABLE}"
    return [
        Stage(name="tests", commands=lambda _: [_tests()], limit_s=180),
        Stage(
            name="operators",
            commands=lambda _: [["benchmarks/film_dual_bn.py", "--without=compile", f"--out={operators}"]],
            limit_s=120,
            figures=lambda: _operator_figures(operators),
        ),
        Stage(
            name="step",
            commands=lambda _: [
                [
                    "benchmarks/train_step.py", "--model=resnet34", f"--batch-size={_batch_size()}", "--without=b",
                    "--rounds=3", f"--out={step}",
                ]
            ],
            limit_s=240,
            figures=lambda: _step_figures(step),
        ),
        Stage(
            name="training",
            commands=lambda left_s: _training_commands(images, out, step, left_s),
            limit_s=_TRAINING_S,
            figures=lambda: _training_figures(out / "runs"),
            skip=skip,
        ),
        Stage(
            name="step compiled",
            commands=lambda _: [
                [
                    "benchmarks/train_step.py", "--model=resnet34", f"--batch-size={_batch_size()}", "--without", "a",
                    "c", "--rounds=3", f"--out={compiled_step}",
                ]
            ],
            limit_s=300,
            may_be_cut=True,
            figures=lambda: _step_figures(compiled_step),
        ),
        Stage(
            name="operators compiled",
            commands=lambda _: [
                ["benchmarks/film_dual_bn.py", "--networks=resnet34", "--rounds=10", f"--out={compiled_operators}"]
            ],
            limit_s=300,
            may_be_cut=True,
            figures=lambda: _operator_figures(compiled_operators),
        ),
    ]  # fmt: skip


def _tests() -> list[str]:
    """The tests marked gpu, by several processes if pytest can: they compile for most of their time.

    Their files are named, because others import packages that a machine without network may lack (Ray, AutoAttack).
    """
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _MARKED.search(path.read_text())]
    parallel = ["-n", str(_TEST_PROCESSES)] if importlib.util.find_spec("xdist") else []
    return ["-m", "pytest", "-q", "-m", "gpu", *parallel, *(str(path.relative_to(ROOT)) for path in files)]


def _batch_size() -> int:
    """Images of a step of ResNet-34 that fit in the published arrangement's float32."""
    return 512 if torch.cuda.get_device_properties(0).total_memory >= 40 * 2**30 else 128


def _operator_figures(path: pathlib.Path) -> str:
    """Share of copy and ratios, sums over all sites; ResNet-34 has bounds to keep."""
    least = {"film_dual_bn": 0.75, "modulate": 0.85}
    figures = []
    for row in _read(path):
        if row["channels"] or row["way"] != "both":
            continue
        asked = f" (asked: {least[row['operator']]:.2f})" if row["network"] == "resnet34" else ""
        figure = f"{row['network']} {row['operator']}: {float(row['share_of_copy']):.2f} of copy{asked}"
        for name in ("eager", "compile"):
            if row[f"{name}_over_ours"]:
                figure += f", {name} / ours {float(row[f'{name}_over_ours']):.2f}"
        figures.append(figure)
    return "; ".join(figures)


def _step_figures(path: pathlib.Path) -> str:
    """Images per second, time of the others over ours, memory, cost ratio."""
    rows = _read(path)
    figures = [
        f"{row['arrangement'].split()[0]}: {row['images_per_s']} images/s, time / ours {row['time_over_ours_median']}, "
        f"peak {row['peak_mib']} MiB, reserved {row['reserved_mib']} MiB"
        for row in rows
    ]
    if "cost_ratio_median" in rows[0]:
        figures.append(f"cost ratio {rows[0]['cost_ratio_median']} (asked: at most {1.15 * 17.17 / 3:.2f})")
    return "; ".join(figures)


def _training_commands(
    images: pathlib.Path | None, out: pathlib.Path, step: pathlib.Path, limit_s: float
) -> list[list[str]]:
    """Prepare the images, train as long as the measured speed allows."""
    try:
        speed = next(float(row["images_per_s"]) for row in _read(step) if row["arrangement"] == "ours")
    except (OSError, StopIteration):
        speed = 0.0
    epochs = int(speed * limit_s * (1 - _TRAINING_OVERHEAD) / _CIFAR_TRAIN_IMAGES)
    # Unknown or slow: one epoch of the small network.
    model = "resnet34" if epochs >= 1 else "wrn10_2"
    epochs = min(max(epochs, 1), _MAX_EPOCHS)
    config = {
        "name": "gpu-check", "output_dir": out / "runs", "data.dataset": "gpu-check", "data.root": out / "data",
        "data.loader": "memory", "model.name": model, "attack.eps_255": 8, "attack.steps": 7,
        "optim.epochs": epochs, "optim.batch_size": 512, "optim.lr": 0.2, "optim.schedule": "onecycle",
        "optim.warmup_share": 0.3, "engine.precision": "bf16", "evaluation.lambdas": "[0, 0.2, 1]",
        "logging.interval_steps": 20, "logging.tensorboard": "false", "checkpoint.interval_epochs": epochs,
        "checkpoint.resume": "never",
    }  # fmt: skip
    prepare = ["launch/prepare_data.py", f"folder:{images}", "--name=gpu-check", f"--out={out / 'data'}", "--val=5000"]
    return [prepare, ["launch/train.py", *(f"--{key}={value}" for key, value in config.items())]]


def _training_figures(runs: pathlib.Path) -> str:
    """SA and RA of the run at every lambda that was measured, and how long it was."""
    path = max(runs.glob("*/frontier.json"))
    frontier = json.loads(path.read_text())
    points = [f"lambda {p['lam']:g}: SA {100 * p['sa']:.1f}, RA {100 * p['ra']:.1f}" for p in frontier["points"]]
    metrics = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    return "; ".join([f"{1 + max(m.get('epoch', 0) for m in metrics)} epochs", *points])


def _read(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def main() -> int:
    """Check, print the table, say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", type=pathlib.Path, default=os.environ.get(IMAGES_VARIABLE) or None, help="CIFAR-10 as images")
    add("--out", type=pathlib.Path, help="folder for logs and CSV files; default: a new temporary one")
    add("--stages", nargs="+", help="names of stages, to run these alone")
    add("--minutes", type=float, default=9, help="for everything")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: torch finds no NVIDIA GPU here; nothing was checked", file=sys.stderr)
        return 2
    images = args.images and pathlib.Path(args.images).resolve()
    if images and not (images / "train").is_dir():
        parser.error(f"--images={images}: has no train/; expected train/<class>/*.jpg and test/<class>/*.jpg")
    out = (args.out or pathlib.Path(tempfile.mkdtemp(prefix="gpu-check-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = build_stages(images, out)
    names = [stage.name for stage in stages]
    if unknown := set(args.stages or ()) - set(names):
        parser.error(f"--stages: no stage {sorted(unknown)}; there are {', '.join(names)}")
    chosen = [stage for stage in stages if args.stages is None or stage.name in args.stages]
    outcomes = run_stages(chosen, out, 60 * args.minutes)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; logs and CSV files: {out}"
    print(f"\n{where}\n\n{summary(outcomes)}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
