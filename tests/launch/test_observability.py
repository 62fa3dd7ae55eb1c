"""What a real run writes and prints about itself."""

import json

import pytest

from oat_dist.runs import load_run
from tests.launch.commands import STEPS


def lines(run, name) -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_tells_where_its_time_goes_and_what_it_sends(two_processes):
    _, network = load_run(two_processes)
    gradient_mib = sum(p.numel() for p in network.parameters()) * 4 / 2**20
    timings = lines(two_processes, "timings")
    assert len(timings) == STEPS
    for timing in timings:
        shares = {phase: timing[f"share_{phase}"] for phase in ("data", "attack", "train", "communication")}
        assert sum(shares.values()) == pytest.approx(1, abs=0.01)
        assert shares["attack"] > 0.05 and shares["train"] > 0.05 and shares["communication"] > 0
        # In a ring of two ranks, each sends its gradient once.
        assert timing["sent_mib_per_step"] == pytest.approx(gradient_mib, rel=0.02)
        assert timing["peak_memory_mib"] > 100


@pytest.mark.slow
@pytest.mark.dist
def test_the_metrics_of_every_lambda_add_up_to_those_of_all(two_processes):
    for line in lines(two_processes, "metrics"):
        by_lambda = [value for key, value in line.items() if key.startswith("loss/")]
        # Equal weights, but for rounding to images: 240 over six lambdas are 40 each.
        assert len(by_lambda) == 6
        assert min(by_lambda) <= line["loss"] <= max(by_lambda)
        assert line["grad_norm"] > 0
        assert {f"accuracy_robust/{lam}" for lam in ("0.1", "0.2", "0.3", "0.4", "1")} <= set(line)
