"""Attacks against a linear network, whose exact robust accuracy is known in closed form."""

import pytest

from oat_dist.evaluation import Plan, parse_attacks, run_plan
from oat_dist.evaluation.loop import CLEAN, ROBUST
from tests.oat_dist.evaluation.networks import Linear, exact_robust, linear_images

EPS = 0.04
# Square Attack with a tenth of its queries, for the time it takes.
AUTOATTACK = ["apgd-ce", "apgd-t", "fab-t", "square-500"]


def outcome(network, batch, names, eps=EPS, norm="linf"):
    # Long enough steps to cross the ball from any start.
    attack = parse_attacks(names, eps=eps, norm=norm, step_size=2.5 * eps / 10 if eps else None)
    return run_plan(network, [batch], Plan(lambdas=(0.5,), attack=attack))


@pytest.mark.parametrize(
    ("num_classes", "names"),
    [(2, ["pgd-10"]), (2, ["cw-10"]), (2, ["mim-10"]), (2, ["pgd-t-10"]), (5, ["pgd-t-10"]),
     (2, ["apgd-ce-20", "apgd-t-20", "fab-t-10", "square-50"]), (5, AUTOATTACK)],
    ids=lambda value: value if isinstance(value, int) else value[0],
)  # fmt: skip
def test_the_attack_gives_the_exact_robust_accuracy_image_by_image(num_classes, names):
    network = Linear(num_classes)
    batch = linear_images(network, 40)
    exact = exact_robust(network, batch, EPS)
    assert 5 < exact.sum() < 35, "the images should be of both kinds"
    assert ((outcome(network, batch, names).of(0.5) == ROBUST) == exact).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_autoattack_finds_in_other_norms_what_a_linear_network_must_yield(norm):
    network = Linear(2)
    batch = linear_images(network, 40)
    # The distance to the boundary is the margin over the dual norm, as far as the pixel range allows.
    weight = network.classifier.weight.detach()
    difference = weight[0] - weight[1]
    logits = network.predict(batch.image_NCHW, 0.5)
    distance = (logits[:, 0] - logits[:, 1]).abs() / difference.norm(p={"l2": 2, "l1": float("inf")}[norm])
    eps = float(distance.median())
    code = outcome(network, batch, ["apgd-ce-20x1", "apgd-t-20"], eps, norm).of(0.5)
    assert (code[distance > 1.001 * eps] != 1).all() and (code[distance > 1.001 * eps] != 2).all()
    if norm == "l2":
        assert ((code == ROBUST) == ((distance > eps) & (code != CLEAN))).double().mean() > 0.9
    assert (code > CLEAN).sum() >= 5


@pytest.mark.parametrize("names", [["pgd-10"], ["pgd-t-10", "square-50", "apgd-ce-10"]], ids=["pgd", "several"])
def test_a_ball_of_radius_0_gives_sa_and_a_larger_ball_never_a_larger_ra(names):
    network = Linear(5)
    batch = linear_images(network, 60)
    robust = {eps: outcome(network, batch, names, eps).of(0.5) == ROBUST for eps in (0.0, 0.03, 0.1, 0.3)}
    assert ((outcome(network, batch, names, 0.0).of(0.5) != CLEAN) == robust[0.0]).all()
    counts = [int(robust[eps].sum()) for eps in robust]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0]
