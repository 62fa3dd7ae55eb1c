"""The recorded losses of `record.py` still come out."""

import json

import pytest

from oat_dist.config import DEFAULTS_VERSION, Config, computed_settings
from tests.golden.record import CASES, DEFAULTS, PATH, losses


@pytest.mark.parametrize("name", CASES)
def test_the_first_float64_losses_are_the_recorded_ones(name):
    assert losses(name) == pytest.approx(json.loads(PATH.read_text())[name], rel=1e-7)


def test_defaults_are_the_recorded_ones_of_their_version():
    """Runs are named by what differs from the defaults: one that changes needs another `DEFAULTS_VERSION`."""
    recorded = json.loads(DEFAULTS.read_text())
    assert recorded == {"version": DEFAULTS_VERSION, "defaults": computed_settings(Config())}
