"""engine.deterministic: which of PyTorch's switches it sets, and that it leaves those of a CPU alone."""

import os

import pytest
import torch

from oat_dist.determinism import changing_shapes, choose_algorithms
from oat_dist.evaluation import EvaluationAttack, Plan, loop, run_plan
from tests.oat_dist.evaluation.networks import Linear, linear_images


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


def test_nothing_is_tried_while_an_evaluation_shrinks_its_batches_and_the_choice_comes_back(switches, monkeypatch):
    choose_algorithms(torch.device("cuda"), deterministic=False)
    network, seen, surfaces = Linear(4), [], loop.Surfaces

    def looking(*args, **kwargs):
        seen.append(torch.backends.cudnn.benchmark)
        return surfaces(*args, **kwargs)

    monkeypatch.setattr(loop, "Surfaces", looking)
    run_plan(network, [linear_images(network, 8)], Plan(lambdas=(0.3,), attack=EvaluationAttack(eps=0.05, steps=2)))
    assert seen and not any(seen) and torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError), changing_shapes():
        raise RuntimeError
    assert torch.backends.cudnn.benchmark
