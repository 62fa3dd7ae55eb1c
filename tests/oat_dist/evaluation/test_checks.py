"""Self-checks: defences made to look robust are flagged, an honest network is not."""

import dataclasses

import pytest
import torch

from oat_dist.config import DataConfig
from oat_dist.data import evaluation_batches
from oat_dist.errors import UserError
from oat_dist.evaluation import EvaluationAttack, Plan, autoattack, checks, iterated, loop, parse_attacks, run_plan
from oat_dist.evaluation.checks import self_checks
from tests.oat_dist.evaluation.networks import (
    Linear,
    answered,
    linear_images,
    masked,
    noisy,
    perturbed_network,
)

LAM = 0.3
ATTACK = EvaluationAttack(eps=0.3, steps=3)


@pytest.fixture(scope="module")
def images(digits):
    batches = evaluation_batches(
        digits, "test", DataConfig(loader="memory"), 64, device=torch.device("cpu"), num_images=64
    )
    return answered(perturbed_network(), batches, LAM)


def flagged(network, batches, attack=ATTACK, lambdas=(LAM,)) -> dict[str, dict]:
    outcome = run_plan(network, batches, Plan(lambdas=lambdas, attack=attack))
    found = self_checks(network, batches, outcome)
    assert [check["check"] for check in found] == [
        "stochastic output", "probabilities instead of logits", "zero gradients", "training mode",
        "gradient-free attack better", "eps exceeded", "fewer than 4 classes",
    ]  # fmt: skip
    return {check["check"]: check for check in found if check["flagged"]}


def test_an_honest_network_is_not_flagged(images):
    strong = parse_attacks(["pgd-10", "cw-10"], eps=0.05, norm="linf")
    assert flagged(perturbed_network(), images, strong, (0.0, LAM)) == {}


def test_masked_gradients_are_flagged_twice(images):
    found = flagged(masked(perturbed_network()), images)
    assert set(found) == {"zero gradients", "gradient-free attack better"}
    assert found["zero gradients"]["worst"] == 1.0 and found["zero gradients"]["lambdas"] == [LAM]
    assert found["gradient-free attack better"]["worst"] > 0.05
    asked = parse_attacks(["pgd-3", "square-50"], eps=0.3, norm="linf")
    share = flagged(masked(perturbed_network()), images, asked)["gradient-free attack better"]["worst"]
    code = run_plan(masked(perturbed_network()), images, Plan(lambdas=(LAM,), attack=asked)).of(LAM)
    assert share >= (code == 2).double().mean() > 0.1


@pytest.mark.parametrize(
    ("found", "broken", "is_flagged"),
    [(3, 30, False), (3, 0, True), (12, 30, True), (1, 0, False), (2, 6, True), (2, 9, False)],
)
def test_a_search_is_held_against_what_gradients_broke_before(found, broken, is_flagged):
    # 64 images: 4 wrong without an attack, `broken` by gradients, the others robust; 32 of these were searched.
    code_M = torch.full((64,), loop.ROBUST, dtype=torch.int8)
    code_M[:4], code_M[4 : 4 + broken] = loop.CLEAN, 1
    outcome = loop.Outcome(plan=Plan(lambdas=(LAM,), attack=ATTACK), index_M=torch.arange(64), code_CM=code_M[None],
                           outside=0)  # fmt: skip
    check = checks._of_search(outcome, [checks._Probe(searched=32, found=found)])
    assert (check["flagged"], check["lambdas"]) == (is_flagged, [LAM] if is_flagged else [])
    assert check["worst"] == (found / 32 if is_flagged else 0)


def test_noisy_weights_are_flagged(images):
    found = flagged(noisy(perturbed_network()), images)
    assert "stochastic output" in found and found["stochastic output"]["worst"] > 1e-3


def test_probabilities_are_flagged(images):
    network = perturbed_network()
    honest = network.attack_logits
    network.attack_logits = lambda x, frozen: honest(x, frozen).softmax(1)
    assert "probabilities instead of logits" in flagged(network, images)


def test_a_saturated_cross_entropy_is_flagged_although_the_margin_has_a_gradient(images):
    network = perturbed_network()
    honest = network.attack_logits
    network.attack_logits = lambda x, frozen: 1e6 * honest(x, frozen)
    assert "zero gradients" in flagged(network, images)


def test_a_module_that_stays_in_training_mode_is_flagged(images):
    class Stubborn(torch.nn.Module):
        def train(self, mode=True):
            return super().train(True)

    network = perturbed_network()
    network.stubborn = Stubborn()
    assert flagged(network, images)["training mode"]["worst"] == 1


def test_an_attack_that_leaves_the_ball_is_flagged_and_breaks_nothing(images, monkeypatch):
    honest = iterated._step
    monkeypatch.setattr(iterated, "_step", lambda x, *args: x + 3 * (honest(x, *args) - x))
    attack = dataclasses.replace(ATTACK, eps=0.001)
    outcome = run_plan(perturbed_network(), images, Plan(lambdas=(LAM,), attack=attack))
    outside = flagged(perturbed_network(), images, attack)["eps exceeded"]
    assert outside["worst"] == outcome.outside > 0


@pytest.mark.parametrize(("num_classes", "name", "is_flagged", "said"), [
    (3, "apgd-t-3", True, "apgd-t used the difference of two logits"), (3, "pgd-3", False, "no attack here uses it"),
    (4, "apgd-t-3", False, "the DLR loss is defined")])  # fmt: skip
def test_few_classes_get_another_loss_and_it_is_said(num_classes, name, is_flagged, said):
    network = Linear(num_classes)
    batches = [linear_images(network, 20)]
    attack = parse_attacks([name], eps=0.05, norm="linf")
    outcome = run_plan(network, batches, Plan(lambdas=(LAM,), attack=attack))
    check = self_checks(network, batches, outcome)[-1]
    assert check["flagged"] == is_flagged and check["worst"] == num_classes and said in check["detail"]


def test_without_the_package_of_autoattack_nothing_is_searched_and_it_is_said(images, monkeypatch):
    monkeypatch.setattr(autoattack, "is_installed", lambda: False)
    network = masked(perturbed_network())
    outcome = run_plan(network, images, Plan(lambdas=(LAM,), attack=ATTACK))
    (check,) = (c for c in self_checks(network, images, outcome) if c["check"] == "gradient-free attack better")
    assert not check["flagged"] and check["detail"].endswith("nothing was searched, pyautoattack is not installed")
    square = parse_attacks(["square-10"], eps=0.3, norm="linf")
    with pytest.raises(UserError, match=r"^attack square-10: needs the package pyautoattack, which is not installed$"):
        run_plan(network, images, Plan(lambdas=(LAM,), attack=square))
