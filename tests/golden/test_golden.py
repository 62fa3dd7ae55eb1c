"""The recorded losses of `record.py` still come out."""

import json

import pytest

from tests.golden.record import CASES, PATH, losses


@pytest.mark.parametrize("name", CASES)
def test_the_first_float64_losses_are_the_recorded_ones(name):
    assert losses(name) == pytest.approx(json.loads(PATH.read_text())[name], rel=1e-7)
