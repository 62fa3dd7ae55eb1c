"""Tables of a search."""

import pytest

from tune.cluster import Outcome
from tune.results import ablation_rows, print_ablation

KEY = "conditioning.encoding"


def outcome(encoding, seed, ra, status="finished"):
    ends = [{"lam": lam, "sa": 0.9, "ra": ra, "sa_ci": [0.86, 0.94], "ra_ci": [ra - 0.05, ra + 0.05]} for lam in (0, 1)]
    job = {"sample": {KEY: encoding, "seed": seed}}
    return Outcome(trial=str(seed), job=job, status=status, metrics={"ratio": ra, "points": ends})


def test_an_ablation_has_the_deviation_over_seeds_and_the_interval_over_images(capsys):
    outcomes = [
        outcome("dct", 0, 0.4),
        outcome("dct", 1, 0.5),
        outcome("none", 0, 0.3),
        outcome("none", 1, 0.0, "failed"),
    ]
    best, other = rows = ablation_rows(outcomes, [KEY])
    assert (best[KEY], best["trials"], best["ra/1"]) == ("dct", 2, pytest.approx(0.45))
    assert best["ra/1_std"] == pytest.approx(0.1 / 2**0.5)
    assert (best["ra/1_low"], best["ra/1_high"]) == (pytest.approx(0.4), pytest.approx(0.5))
    assert other["trials"] == 1 and other["ra/0_std"] is None and other["ra/0_high"] == pytest.approx(0.35)
    print_ablation(rows, [KEY], "title")
    printed = "".join(line.strip() for line in capsys.readouterr().out)
    assert "[40.0," in printed and "90.0" in printed
