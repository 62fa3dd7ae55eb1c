"""Every arrangement of a step trains, and tells where its time goes."""

import json
from functools import partial

import batch_size
import pytest
import torch
import train_step
from arrangements import ARRANGEMENTS, draw_batches
from measuring import Stopwatch
from published_step import Told, as_attacked, published, published_attack
from table import environment

from oat_dist.config import Config
from oat_dist.models import build_model

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return train_step.parse(["--model=resnet8", "--batch-size=12", "--rounds=1", "--device=cpu", "--precision=fp32"])


@pytest.fixture
def interpreted(monkeypatch):
    """torch.compile that traces but generates no code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize(
    "name, precision", [("ours", "fp32"), ("ours", "bf16"), ("a", "fp32"), ("b", "bf16"), ("c", "fp32"), ("c", "bf16")]
)
def test_a_step_changes_the_weights_and_names_its_phases(name, precision, args, tmp_path, interpreted, monkeypatch):
    args.precision = precision
    setting, clock, moved = train_step.make_setting(args, str(tmp_path)), Stopwatch(CPU), []
    step_of_sgd = torch.optim.SGD.step

    def step(self, *a, **k):
        before = [p.detach().clone() for p in self.param_groups[0]["params"]]
        step_of_sgd(self, *a, **k)
        moved.extend(not torch.equal(p, q) for p, q in zip(self.param_groups[0]["params"], before, strict=True))

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    seconds = train_step.turn(ARRANGEMENTS[name](setting), 1, clock, CPU)
    assert sum(moved) > 0.5 * len(moved) > 0
    phases = clock.read_ms()
    expected = {"data", "attack", "train_forward", "train_backward", "optimizer"} - (
        {"attack"} if name == "c" else set()
    )
    assert set(phases) == expected and 0 < sum(phases.values()) <= 1000 * seconds


def test_batches_have_their_zeros_first_and_a_constant_number_of_them(args, tmp_path):
    batches = draw_batches(train_step.make_setting(args, str(tmp_path)))
    for _ in range(30):
        _, batch, lam_N = next(batches)
        assert batch.image_NCHW.shape == (12, 1, 8, 8)
        assert (lam_N[:2] == 0).all() and (lam_N[2:] > 0).all()


def test_an_arrangement_that_fails_alone_is_left_out_and_ours_is_not(args, monkeypatch, capsys):
    def alone(name, args, rounds):
        if name == broken:
            raise RuntimeError("out of memory")
        return {"seconds": [1.0]}

    monkeypatch.setattr(train_step, "alone", alone)
    broken = "a"
    assert list(train_step.alone_or_left_out(["ours", "a", "c"], args)) == ["ours", "c"]
    assert "a is left out: out of memory" in capsys.readouterr().err
    broken = "ours"
    with pytest.raises(RuntimeError, match="out of memory"):
        train_step.alone_or_left_out(["ours", "a"], args)


def test_rows_and_table_tell_all_arrangements_against_ours(args, interpreted, monkeypatch):
    monkeypatch.setattr(train_step, "alone", lambda name, args, rounds: {"seconds": [1.0], "peak_mib": 12.3})
    rows = [row | environment(CPU) for row in train_step.measure(list(ARRANGEMENTS), args)]
    assert [row["arrangement"] for row in rows] == list(train_step.TITLES.values())
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert rows[0]["time_over_ours_median"] == 1 and all(row["peak_mib"] == 12.3 for row in rows)
    assert rows[0]["cost_ratio_median"] == pytest.approx(1 / rows[3]["time_over_ours_median"], rel=0.02)
    text = train_step.report(rows)
    assert text.count("\n| ") == 5 and "Cost ratio (ours / c, time per image)" in text


def test_the_published_attack_stays_in_its_ball_and_gives_parameters_their_gradients_back():
    network = build_model(Config(), in_channels=1, num_classes=10)
    twin = published(network)
    x, label = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    codes = network.encoder.codes_KE[[1, 2, 3, 5]]
    wanted = []

    def logits(images):
        wanted.extend(p.requires_grad for p in twin.parameters())
        return twin._logits(images, Told(codes, 0))

    with as_attacked(twin):
        x_adv = published_attack(logits, x, label, eps=0.1, steps=3, step_size=0.05)
    assert not any(wanted) and all(p.requires_grad for p in twin.parameters()) and twin.training
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and (x_adv - x).abs().max() > 0.05
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad


def test_the_cost_of_a_batch_is_fitted_by_a_line(monkeypatch, args):
    slope, intercept, r_squared = batch_size.linear_fit([1, 2, 4], [3.0, 5.0, 9.0])
    assert (slope, intercept, r_squared) == (pytest.approx(2), pytest.approx(1), pytest.approx(1))
    args.batch_sizes = [10, 20, 40]
    monkeypatch.setattr(
        train_step, "alone", lambda name, args, rounds: {"seconds": [args.batch_size / 5], "peak_mib": 1.0}
    )
    rows = batch_size.measure(args)
    assert [row["s_per_image_over_median"] for row in rows] == [1, 1, 1]
    assert "R^2 = 1.00000" in batch_size.report(rows, environment(CPU))


@pytest.mark.slow
def test_one_arrangement_alone_prints_seconds_and_memory(args):
    result = train_step.alone("ours", args, rounds=2)
    assert len(result["seconds"]) == 2 and result["peak_mib"] > 0
    assert json.dumps(result)
