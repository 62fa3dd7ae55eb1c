"""Leaving clean images with lambda = 1 out of the training forward: the published calls without them, counted right."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks.published_step import published, published_forward
from oat_dist import step as step_module
from oat_dist.config import ConditioningConfig, Config, LossConfig
from oat_dist.cost import training_cost
from oat_dist.distributed import World
from oat_dist.errors import UserError
from oat_dist.losses import robust_term
from oat_dist.step import training_losses
from oat_dist.step_log import StepLog
from tests.oat_dist.test_step import disturbed, make, make_batch

LAMBDAS = {
    "some ones": [0, 0, 0.1, 1, 0.4, 1, 0.3, 1],
    "no ones": [0, 0.1, 0.4, 0.4],
    "all ones": [1, 1, 1],
    "ones and zeros": [0, 0, 1, 1],
}


def make_config(norm="dual", clean_at_one=False) -> Config:
    return dataclasses.replace(make(norm=norm), loss=LossConfig(clean_at_one=clean_at_one))


@pytest.mark.parametrize("lambdas", LAMBDAS.values(), ids=LAMBDAS)
@pytest.mark.parametrize("norm", ["dual", "single"])
def test_the_step_equals_three_calls_whose_clean_call_leaves_those_images_out(norm, lambdas, monkeypatch):
    config, lam = make_config(norm), torch.tensor(lambdas, dtype=torch.float64)
    network, batch = disturbed(config), make_batch(len(lam))
    twin, seen = published(network), []
    answer = published_forward(twin)
    attack = step_module.attack_images
    monkeypatch.setattr(step_module, "attack_images", lambda *a, **k: seen.append(attack(*a, **k)) or seen[-1])
    ours = training_losses(network, batch, lam, config=config, epoch=0, forward=network)
    ours.loss_N.mean().backward()

    codes = network.encoder(lam)[network.encoder.rows(lam)[1]]
    is_zero, below_one = lam == 0, lam < 1
    loss = torch.zeros(len(lam), dtype=torch.float64)
    if below_one.any():
        logits = answer(batch.image_NCHW[below_one], codes[below_one], int(is_zero.sum()))
        clean = F.cross_entropy(logits, batch.label_N[below_one], reduction="none")
        loss = loss.index_add(0, below_one.nonzero().flatten(), (1 - lam[below_one]) * clean)
        assert ours.counts["loss_clean"].item() == pytest.approx(clean.sum().item(), rel=1e-10)
        assert ours.counts["correct_clean"] == (logits.argmax(1) == batch.label_N[below_one]).sum()
    robust = F.cross_entropy(answer(seen[0], codes[~is_zero], 0), batch.label_N[~is_zero], reduction="none")
    loss = loss.index_add(0, (~is_zero).nonzero().flatten(), lam[~is_zero] * robust)
    loss.mean().backward()

    assert ours.num_clean == int(below_one.sum())
    torch.testing.assert_close(ours.loss_N, loss, rtol=1e-10, atol=1e-10)
    compared = 0
    for name, module in network.named_modules():
        other = twin.get_submodule(name)
        if hasattr(other, "norms"):
            for key in ("weight", "bias", "running_mean", "running_var"):
                parts = [getattr(n, key) for n in other.norms]
                if key in ("weight", "bias"):
                    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
                tensor = getattr(module, key)
                got = tensor.grad if key in ("weight", "bias") else tensor
                torch.testing.assert_close(got, torch.stack(parts), rtol=1e-10, atol=1e-10, msg=f"{name}.{key}")
                compared += 1
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.testing.assert_close(module.weight.grad, other.weight.grad, rtol=1e-10, atol=1e-10, msg=name)
            compared += 1
    assert compared > 50


def test_batches_without_lambda_one_are_the_same_either_way():
    lam, results = torch.tensor([0, 0.1, 0.4, 0.4], dtype=torch.float64), []
    for clean_at_one in (True, False):
        config = make_config(clean_at_one=clean_at_one)
        network = disturbed(config)
        step = training_losses(network, make_batch(4), lam, config=config, epoch=0, forward=network)
        results.append((step.loss_N.detach(), network.stem_norm.running_var, step.num_clean))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_images_that_are_kept_move_the_statistics_and_change_no_weight_of_the_loss():
    lam, results = torch.tensor([0, 0.1, 1, 1], dtype=torch.float64), []
    for clean_at_one in (True, False):
        config = make_config(clean_at_one=clean_at_one)
        network, sizes = disturbed(config), []

        def forward(x, cond, network=network, sizes=sizes):
            sizes.append(len(x))
            return network(x, cond)

        training_losses(network, make_batch(4), lam, config=config, epoch=0, forward=forward)
        results.append((sizes, network.stem_norm.running_mean))
    assert [sizes for sizes, _ in results] == [[7], [5]]
    assert not torch.allclose(results[0][1][1], results[1][1][1])
    assert torch.equal(results[0][1][0], results[1][1][0]), "lambda = 0 has statistics of its own"


def test_an_objective_that_needs_clean_logits_is_refused_by_both_keys():
    assert robust_term(Config(loss=LossConfig(robust="trades"))).name == "trades"
    with pytest.raises(UserError, match=r"^loss.clean_at_one=False: must be true with loss.robust=trades, .*needs"):
        robust_term(Config(loss=LossConfig(robust="trades", clean_at_one=False)))


def test_means_go_over_the_images_they_are_about():
    log = StepLog(World())
    counts = {"loss": 6.0, "loss_clean": 4.0, "correct_clean": 1.0, "loss_robust": 9.0, "correct_robust": 3.0}
    tensors = {name: torch.tensor(value) for name, value in counts.items()}
    log.add(tensors, images=4, clean=2, robust=3)
    log.add(tensors, images=2, clean=2, robust=0)
    expected = {"loss": 2.0, "loss_clean": 2.0, "accuracy_clean": 0.5, "loss_robust": 6.0, "accuracy_robust": 2.0}
    assert log.flush() == (expected, 6)
    log.add(tensors, images=2, clean=2, robust=0)
    assert set(log.flush()[0]) == {"loss", "loss_clean", "accuracy_clean"}, "of nothing there is no mean"


def test_a_log_goes_on_from_what_it_collapsed_to():
    log, other = StepLog(World()), StepLog(World())
    log.add({"loss": torch.tensor(6.0), "loss_clean": torch.tensor(1.0)}, images=4, clean=2, robust=3)
    other.restore(log.collapse())
    assert other.flush() == log.flush() == ({"loss": 1.5, "loss_clean": 0.5}, 4)


@pytest.mark.parametrize(
    ("settings", "share"),
    [({}, 1 / 6), ({"lambdas": (0.0, 1.0), "weights": (1.0, 3.0)}, 0.75), ({"lambdas": (0.0, 0.5)}, 0.0),
     ({"distribution": "uniform", "encoding": "fourier"}, 0.0)],
)  # fmt: skip
def test_the_cost_counts_the_clean_images_that_are_left(settings, share):
    def units(clean_at_one):
        config = Config(conditioning=ConditioningConfig(**settings), loss=LossConfig(clean_at_one=clean_at_one))
        shape = {"in_channels": 1, "image_size": (8, 8), "num_classes": 10, "num_train_images": 250}
        return training_cost(config, **shape).units_per_image

    assert units(True) - units(False) == pytest.approx(3 * share)
