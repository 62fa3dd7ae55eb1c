"""What a log step tells: losses by lambda, where the time went, one line, and the same on the boards."""

import json
import time

import pytest
import torch

from oat_dist.boards import open_boards, require_boards
from oat_dist.config import ConditioningConfig, Config, LoggingConfig
from oat_dist.distributed import World
from oat_dist.errors import UserError
from oat_dist.interval_line import interval_line
from oat_dist.lambda_log import LambdaLog
from oat_dist.metrics import MetricsWriter
from oat_dist.profiling import profiled_steps
from oat_dist.step import StepLosses
from oat_dist.telemetry import Telemetry

LAM = torch.tensor([0.0, 0.0, 0.4, 1.0, 1.0], dtype=torch.float64)


def losses(num_clean=5) -> StepLosses:
    loss_N = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0])
    return StepLosses(
        loss_N=loss_N, counts={"loss": loss_N.sum()}, num_clean=num_clean,
        correct_clean_M=torch.tensor([True, False, True, True, True])[:num_clean],
        correct_robust_A=torch.tensor([True, True, False]), logits=(torch.zeros(num_clean, 2), torch.zeros(3, 2)),
        x_adv=torch.zeros(3, 1, 2, 2),
    )  # fmt: skip


EXPECTED = {
    "loss/0": 1.5, "loss/0.4": 3.0, "loss/1": 5.0,
    "accuracy_clean/0": 0.5, "accuracy_clean/0.4": 1.0, "accuracy_clean/1": 1.0,
    "accuracy_robust/0.4": 1.0, "accuracy_robust/1": 0.5,
}  # fmt: skip


def test_loss_and_accuracy_are_means_over_the_images_of_each_lambda():
    log = LambdaLog(World(), ConditioningConfig())
    for _ in range(2):
        log.add(losses(), LAM)
    assert log.flush() == EXPECTED
    assert log.flush() == {}


def test_clean_images_of_lambda_one_that_were_left_out_are_not_counted():
    log = LambdaLog(World(), ConditioningConfig())
    log.add(losses(num_clean=3), LAM)
    assert log.flush() == {key: value for key, value in EXPECTED.items() if key != "accuracy_clean/1"}


def test_a_continuous_distribution_has_a_bin_for_every_tenth():
    log = LambdaLog(World(), ConditioningConfig(distribution="uniform", encoding="none"))
    log.add(losses(), LAM)
    assert {key: value for key, value in log.flush().items() if key.startswith("loss")} == {
        "loss/0": 1.5, "loss/(0.3,0.4]": 3.0, "loss/(0.9,1]": 5.0,
    }  # fmt: skip


def test_sums_that_a_checkpoint_carries_go_on():
    log, later = (LambdaLog(World(), ConditioningConfig()) for _ in range(2))
    log.add(losses(), LAM)
    later.restore(json.loads(json.dumps(log.collapse())))
    later.add(losses(), LAM)
    assert later.flush() == EXPECTED


def test_taking_note_of_a_step_does_not_wait_for_the_device():
    from tests.oat_dist.test_step import _NoWaiting

    telemetry = Telemetry(World(), Config())
    with _NoWaiting():
        telemetry.clock.mark("data")
        telemetry.add(1.0, losses(), LAM)
        telemetry.end_step(torch.tensor(2.0))


def test_a_report_has_values_in_one_file_times_in_the_other_and_one_line_for_people(tmp_path, capsys):
    telemetry = Telemetry(World(), Config())
    for phase in ("data", "attack", "train"):
        telemetry.clock.mark(phase)
    assert telemetry.communicate(lambda: "result", 2**20) == "result"
    telemetry.add(1.0, losses(), LAM)
    telemetry.end_step(torch.tensor(0.25))
    with MetricsWriter(tmp_path) as metrics:
        line = telemetry.report(metrics, 10, 220, epoch=2, lr=0.1)
    values, timing = (json.loads((tmp_path / f"{name}.jsonl").read_text()) for name in ("metrics", "timings"))
    assert values == {"step": 10, "epoch": 2, "lr": 0.1, "loss": 3.2, **EXPECTED, "grad_norm": 0.25}
    shares = [timing[f"share_{phase}"] for phase in ("data", "attack", "train", "communication")]
    assert sum(shares) == pytest.approx(1, abs=0.01) and timing["sent_mib_per_step"] == 1
    assert timing["peak_memory_mib"] > 10 and timing["images_per_s"] > 0
    assert capsys.readouterr().out == line + "\n"
    assert line.startswith("step 10/220 (epoch 3), loss 3.200, grad 0.25, lr 0.1, ")


def test_the_line_leaves_out_what_is_not_there():
    assert interval_line(3, 9, {}, {}) == "step 3/9"
    values = {"accuracy_clean": 0.5, "accuracy_robust": 0.25}
    timing = {"images_per_s": 1234.5, "share_attack": 0.75, "share_data": 0.25, "peak_memory_mib": 2048.0}
    expected = "step 3/9, clean 50.0% robust 25.0%, 1234 images/s, data 25% attack 75%, 2.0 GiB"
    assert interval_line(3, 9, values, timing) == expected
    assert interval_line(3, 9, {"accuracy_clean": 0.5}, {}) == "step 3/9, clean 50.0%"


def test_the_trace_holds_as_many_steps_as_were_asked_for(tmp_path):
    with profiled_steps(tmp_path, 0, 2) as done:
        for _ in range(6):
            torch.ones(3).square()
            done()
    events = json.loads((tmp_path / "profile/rank0.json").read_text())["traceEvents"]
    assert sum(event["name"] == "aten::square" for event in events) == 2
    with profiled_steps(tmp_path / "none", 0, 0) as done:
        done()
    assert not (tmp_path / "none").exists()


def test_weights_and_biases_keeps_the_values_of_every_log_step_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = Config(seed=77, logging=LoggingConfig(tensorboard=False, wandb=True))
    require_boards(config)
    for step, loss in ((10, 0.53125), (20, 0.28125)):  # the second time as a run that goes on
        with MetricsWriter(tmp_path, open_boards(config, tmp_path)) as metrics:
            metrics.write(step, {"loss": loss}, timing={"share_data": 0.15625})
    expected = (b"0.53125", b"0.28125", b"0.15625", b"share_data", b"oat-digits")
    end, missing = time.monotonic() + 30, list(expected)
    while missing and time.monotonic() < end:  # another process writes them
        parts = tmp_path.glob(f"wandb/offline-run-*/run-{tmp_path.name}.wandb")
        written = b"".join(part.read_bytes() for part in parts)
        missing = [value for value in expected if value not in written]
    assert not missing


def test_without_weights_and_biases_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging.wandb=True: wandb is not installed; pip install 'oat-dist\[wandb\]'"):
        require_boards(Config(logging=LoggingConfig(wandb=True)))
    require_boards(Config())
