"""The tables of conditioning and of widths: every row is a run that can be made, and the cost of widths is measured."""

import conditioning
import pytest
import torch
import widths

from oat_dist.config import fingerprint
from oat_dist.config_io import load_config
from oat_dist.models import build_model


def test_every_row_of_the_ablation_is_a_run_of_its_own_that_can_be_built():
    configs = [load_config([], conditioning.settings_of(row)) for row in conditioning.ROWS]
    assert len({fingerprint(config) for config in configs}) == len(configs) == 14
    kinds = {(c.conditioning.kind, c.conditioning.film, c.conditioning.norm) for c in configs}
    assert ("float", "none", "dual") in kinds and ("film", "table", "shared_statistics") in kinds
    for config in configs:
        build_model(config, in_channels=1, num_classes=10).condition(torch.zeros(1))


def test_a_table_says_what_conditioning_adds():
    rows = [{"film": "table", "norm": "dual", "parameters": 105}, {"film": "none", "norm": "single", "parameters": 100}]
    text = conditioning.report(rows, 100, {"seeds": "0"})
    assert "| table | dual | 105 | 5 |" in text and text.endswith("seeds 0")


def test_a_step_of_all_widths_is_measured_beside_steps_of_each_alone():
    cpu = torch.device("cpu")
    rows = widths.cost_rows("resnet8", (0.5, 1.0), batch_size=12, rounds=1, size=8, device=cpu)
    assert [row["widths"] for row in rows] == ["all", "0.5", "1"]
    whole, *alone = (row["step_ms"] for row in rows)
    assert rows[0]["all_over_sum_median"] == pytest.approx(whole / sum(alone), rel=0.01)
    assert rows[1]["all_over_sum_median"] is None
