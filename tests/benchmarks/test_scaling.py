"""How scaling is worked out from turns, and that its model has the limits it must have."""

from dataclasses import replace

import pytest
import scaling
import scaling_model


def test_ratios_are_taken_within_a_round_and_against_the_right_arrangement():
    turn = {"communication": 0.25, "sent_mib_per_step": 2.0}
    rates = {"alone": [10, 20], "apart": [16, 40], "weak": [15, 38], "strong": [15, 30]}
    rows = scaling.rows_of({k: [{"images_per_s": r, **turn} for r in v] for k, v in rates.items()})
    found = {row["arrangement"]: (row["against"], row["ratio_min"], row["ratio_max"]) for row in rows}
    assert found["weak"] == ("apart", 0.938, 0.95) and found["strong"] == ("alone", 1.5, 1.5)


def test_the_model_is_perfect_without_communication_and_jitter_and_falls_with_processes():
    free = replace(scaling_model.GPU, bandwidth=float("inf"), latency_s=0.0, jitter=0.0)
    assert scaling_model.efficiency(free, 512) == 1
    falling = [scaling_model.efficiency(scaling_model.GPU, n) for n in (1, 8, 64, 512)]
    assert falling[0] == 1 and falling == sorted(falling, reverse=True) and falling[-1] > 0.5


def test_a_step_that_communicates_a_tenth_of_its_time_is_predicted_nine_tenths_efficient():
    assert scaling_model.predicted({"communication": "0.1"}) == pytest.approx(0.9)
