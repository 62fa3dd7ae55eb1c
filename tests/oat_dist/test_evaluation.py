"""SA and RA: exact counts, worst case over restarts, independence of batches and mode."""

import dataclasses

import pytest
import torch

from oat_dist.attacks import pgd
from oat_dist.config import Config, DataConfig
from oat_dist.data import evaluation_batches
from oat_dist.evaluation import EvaluationAttack, evaluate
from oat_dist.models import build_model
from oat_dist.random import draw_keys
from tests.ranks import run_ranks

LAMBDAS = (0.0, 0.3, 1.0)
ATTACK = EvaluationAttack(eps=0.1, steps=3)


def make_network():
    network = build_model(Config(), in_channels=1, num_classes=10)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=gen))
    return network


def batches(digits, size=512):
    return evaluation_batches(digits, "test", DataConfig(loader="memory"), size, device=torch.device("cpu"))


def by_hand(network, digits, lam, attack):
    """Accuracies image by image."""
    (batch,) = batches(digits)
    network.eval()
    cond = network.condition(torch.full((len(batch.label_N),), lam, dtype=torch.float64))

    def logits(x):
        return network(x, cond)

    clean = logits(batch.image_NCHW).argmax(1) == batch.label_N
    robust = clean.clone()
    for restart in range(attack.restarts):
        key = draw_keys(0, "evaluation start", restart, batch.index_N)
        x_adv = pgd(logits, batch.image_NCHW, batch.label_N, eps=attack.eps, steps=attack.steps, start_key=key)
        robust &= logits(x_adv).argmax(1) == batch.label_N
    return clean.double().mean().item(), robust.double().mean().item()


@pytest.mark.parametrize("restarts", [1, 2])
def test_points_equal_accuracies_counted_by_hand(digits, restarts):
    network, attack = make_network(), dataclasses.replace(ATTACK, restarts=restarts)
    points = evaluate(network, batches(digits), LAMBDAS, attack)
    for point in points:
        sa, ra = by_hand(network, digits, point["lam"], attack)
        assert (point["sa"], point["ra"]) == (pytest.approx(sa), pytest.approx(ra))
    assert [p["lam"] for p in points] == list(LAMBDAS)
    assert len({p["sa"] for p in points}) > 1, "the lambdas of this network should differ"


def test_batch_size_does_not_matter_and_the_mode_is_restored(digits):
    network = make_network().train()
    whole = evaluate(network, batches(digits), LAMBDAS, ATTACK)
    assert evaluate(network, batches(digits, size=37), LAMBDAS, ATTACK) == whole
    assert network.training


def test_a_stronger_attack_leaves_fewer_images_and_none_adds_any(digits):
    network = make_network()
    robust = {
        eps: evaluate(network, batches(digits), (1.0,), EvaluationAttack(eps=eps, steps=5))[0]
        for eps in (0.0, 0.05, 0.3)
    }
    assert robust[0.0]["ra"] == robust[0.0]["sa"]
    assert robust[0.0]["ra"] >= robust[0.05]["ra"] >= robust[0.3]["ra"]
    assert robust[0.3]["ra"] < robust[0.0]["ra"]


def shared(world, folder):
    from oat_dist.data import open_prepared

    return evaluate(make_network(), batches(open_prepared(folder, "digits"), 64), LAMBDAS, ATTACK, world=world)


@pytest.mark.dist
def test_three_ranks_count_every_image_once(digits):
    alone = evaluate(make_network(), batches(digits), LAMBDAS, ATTACK)
    assert run_ranks(shared, 3, str(digits.folder.parent)) == [alone] * 3


def test_the_report_of_an_attack_spells_out_its_step_size():
    assert EvaluationAttack(eps=8 / 255, steps=20).to_dict() == {
        "name": "pgd-20", "eps": 8 / 255, "steps": 20, "norm": "linf", "step_size": pytest.approx(10 / 255 / 20),
        "restarts": 1,
    }  # fmt: skip
    assert EvaluationAttack(eps=0.1, restarts=5).name == "pgd-20x5"
