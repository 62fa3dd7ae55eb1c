"""The tables of conditioning and of widths: every row is a run that can be made, and the cost of widths is measured."""

import json

import conditioning
import pytest
import table
import torch
import trained
import widths

from oat_dist.config import Config, ModelConfig, fingerprint
from oat_dist.config_io import load_config
from oat_dist.cost import forward_flops
from oat_dist.models import build_model


def test_every_row_of_the_ablation_is_a_run_of_its_own_that_can_be_built():
    configs = [load_config([], conditioning.settings_of(row)) for row in conditioning.ROWS]
    assert len({fingerprint(config) for config in configs}) == len(configs) == 14
    kinds = {(c.conditioning.kind, c.conditioning.film, c.conditioning.norm) for c in configs}
    assert ("float", "none", "dual") in kinds and ("film", "table", "shared_statistics") in kinds
    for config in configs:
        build_model(config, in_channels=1, num_classes=10).condition(torch.zeros(1))


def _row(film, norm, kind="film", **columns):
    return {"film": film, "norm": norm, "kind": kind, "parameters": 105, "images_per_s": 1.5} | columns


def test_a_table_says_what_conditioning_adds():
    rows = [
        _row("table", "dual", seeds="0", commit="a"),
        _row("none", "single", seeds="0", commit="b") | {"parameters": 100},
    ]
    text = conditioning.report(rows, 100)
    assert "| table | dual | film | 105 | 1.5 | 5 |" in text and text.endswith("\n\nseeds 0, commit a b")


def test_rows_measured_before_stay_in_the_table_unless_measured_again_or_otherwise(tmp_path):
    path = tmp_path / "rows.csv"
    conditions = {"seeds": "0", "images": 500, "commit": "12e4567", "dirty": "no"}
    old = [_row("mlp", "dual", score=0.5), _row("none", "dual", "float", score=0.4)]
    table.save([row | conditions for row in old], path)
    now = conditions | {"commit": "new"}
    rows = conditioning.together([_row("table", "dual", score=0.7), _row("mlp", "dual", score=0.6)], now, path)
    assert [(row["film"], row["score"], row["commit"]) for row in rows] == [
        ("mlp", 0.6, "new"), ("table", 0.7, "new"), ("none", 0.4, "12e4567"),
    ]  # fmt: skip
    for other in ({"images": 501}, {"seeds": "0 1"}, {"recipe": "x"}):
        assert len(conditioning.together([_row("table", "dual", score=0.7)], now | other, path)) == 1, other
    assert len(conditioning.together([_row("table", "dual", score=0.7)], now, tmp_path / "none.csv")) == 1


def test_a_step_of_all_widths_is_measured_beside_steps_of_each_alone():
    cpu = torch.device("cpu")
    rows = widths.cost_rows("resnet8", (0.5, 1.0), batch_size=12, rounds=1, size=8, device=cpu)
    assert [row["widths"] for row in rows] == ["all", "0.5", "1"]
    whole, *alone = (row["step_ms"] for row in rows)
    narrow, wide = (
        forward_flops(build_model(Config(model=ModelConfig(channels=c)), in_channels=3, num_classes=10), (3, 8, 8))
        for c in ((8, 8, 16, 32), (16, 16, 32, 64))
    )
    share = narrow / wide
    assert rows[0]["all_over_sum_median"] == pytest.approx(whole / sum(alone), rel=0.01)
    assert rows[0]["all_over_flops_median"] == pytest.approx(whole / (alone[1] * (1 + share)), rel=0.01)
    assert rows[1]["all_over_sum_median"] is rows[1]["all_over_flops_median"] is None


def test_the_seconds_of_a_run_leave_out_its_interruptions_and_nothing_else(tmp_path):
    elapsed = [10.0, 20.5, 4.0, 8.0, 9.5]  # ended after 20.5 s, and gone on with from there
    lines = [json.dumps({"step": i + 1, "elapsed_s": seconds}) for i, seconds in enumerate(elapsed)]
    (tmp_path / "timings.jsonl").write_text("\n".join(lines))
    assert trained.training_seconds(tmp_path) == 30.0
