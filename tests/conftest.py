"""Fixtures shared by all tests."""

import os
import pathlib

# Before anything imports triton, which reads it once.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from oat_dist.data import PreparedData, prepare
from tests.shown_runs import make_runs


@pytest.fixture(autouse=True)
def same_threads():
    """A test leaves torch's number of threads as it found it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> PreparedData:
    """The digits, prepared once."""
    return prepare(str(tmp_path_factory.mktemp("data")), "digits")


def pytest_collection_modifyitems(items):
    """Tests marked gpu need one."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def shown_runs(digits, tmp_path_factory) -> list[pathlib.Path]:
    """Three finished runs for the page."""
    return make_runs(digits, tmp_path_factory.mktemp("shown"))
