"""engine.deterministic: which of PyTorch's switches it sets, and that it leaves those of a CPU alone."""

import os

import pytest
import torch

from oat_dist.determinism import choose_algorithms


@pytest.fixture
def switches(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_repeats_or_chooses_by_speed_whatever_was_chosen_before(switches, deterministic):
    for now in (not deterministic, deterministic):
        choose_algorithms(torch.device("cuda"), deterministic=now)
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert "CUBLAS_WORKSPACE_CONFIG" in os.environ


def test_on_a_cpu_nothing_changes(switches):
    choose_algorithms(torch.device("cpu"), deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
