"""SA and RA: exact counts, worst case over iterates and attacks, independence of batches, ranks, kills and mode."""

import dataclasses
import pathlib

import pytest
import torch
import torch.nn.functional as F

from oat_dist.attacks import NORMS, random_start
from oat_dist.config import DataConfig, default_step_size
from oat_dist.data import evaluation_batches, open_prepared
from oat_dist.errors import UserError
from oat_dist.evaluation import EvaluationAttack, Plan, evaluate, parse_attacks, run_plan
from oat_dist.evaluation.loop import CLEAN, ROBUST
from oat_dist.evaluation.unit_log import UnitLog, forget_units
from oat_dist.random import draw_keys
from tests.oat_dist.evaluation.networks import answered, perturbed_network
from tests.ranks import run_ranks

LAMBDAS = (0.0, 0.3, 1.0)
ATTACK = EvaluationAttack(eps=0.1, steps=3)
# The first two see all images of a shard together and draw from torch's generator.
SEVERAL = parse_attacks(["square-5", "apgd-ce-3", "pgd-2x2", "cw-2", "pgd-t-2"], eps=0.02, norm="linf", targets=2)
FULL = Plan(lambdas=(0.0, 0.3), attack=SEVERAL, attack_lambdas=(0.3, 1.0), random_draws=2)


def batches(digits, size=512, num_images=None):
    """Images with the labels that the network gives at lambda 0.3."""
    cfg = DataConfig(loader="memory")
    images = evaluation_batches(digits, "test", cfg, size, device=torch.device("cpu"), num_images=num_images)
    return answered(perturbed_network(), images, 0.3)


def robust_by_hand(network, batch, lam, attack):
    """[N] clean and [N] robust: every iterate of every restart, on all images."""
    network.eval()
    cond = network.condition(torch.full((len(batch.label_N),), lam, dtype=torch.float64))
    x, label, geometry = batch.image_NCHW, batch.label_N, NORMS[attack.norm]
    clean = network(x, cond).argmax(1) == label
    robust = clean.clone()
    for restart in range(attack.restarts):
        key = draw_keys(0, "evaluation start", restart, batch.index_N)
        x_adv = random_start(x, key, eps=attack.eps, norm=attack.norm)
        for _ in range(attack.steps):
            x_adv.requires_grad_(True)
            logits = network(x_adv, cond)
            robust &= logits.argmax(1) == label
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, label, reduction="sum"), x_adv)
            moved = x_adv.detach() + default_step_size(attack.eps, attack.steps) * geometry.ascent(grad)
            x_adv = (x + geometry.project(moved - x, attack.eps)).clamp(0, 1)
        robust &= network(x_adv, cond).argmax(1) == label
    return clean, robust


@pytest.mark.parametrize(("restarts", "norm", "eps"), [(1, "linf", 0.02), (2, "linf", 0.02), (1, "l2", 0.1)])
def test_points_equal_accuracies_counted_by_hand(digits, restarts, norm, eps):
    network = perturbed_network()
    attack = EvaluationAttack(steps=3, restarts=restarts, norm=norm, eps=eps)
    points = evaluate(network, batches(digits, size=64), LAMBDAS, attack)
    (batch,) = batches(digits)
    for point in points:
        clean, robust = robust_by_hand(network, batch, point["lam"], attack)
        assert (point["sa"], point["ra"]) == (clean.double().mean(), robust.double().mean())
    assert [p["lam"] for p in points] == list(LAMBDAS)
    assert len({p["sa"] for p in points}) > 1, "the lambdas of this network should differ"
    assert any(0 < p["ra"] < p["sa"] for p in points), "the attack should break some and not all"


def test_batch_size_does_not_matter_and_the_mode_is_restored(digits):
    network = perturbed_network().train()
    whole = evaluate(network, batches(digits), LAMBDAS, ATTACK)
    assert evaluate(network, batches(digits, size=37), LAMBDAS, ATTACK) == whole
    assert network.training


def test_a_stronger_attack_leaves_fewer_images_and_none_adds_any(digits):
    network = perturbed_network()
    robust = {
        eps: evaluate(network, batches(digits), (1.0,), EvaluationAttack(eps=eps, steps=5))[0]
        for eps in (0.0, 0.05, 0.3)
    }
    assert robust[0.0]["ra"] == robust[0.0]["sa"]
    assert robust[0.0]["ra"] >= robust[0.05]["ra"] >= robust[0.3]["ra"]
    assert robust[0.3]["ra"] < robust[0.0]["ra"]


def test_only_images_that_no_attack_broke_go_on_to_the_next(digits, monkeypatch):
    from oat_dist.evaluation import autoattack, iterated

    seen = []
    for module in (iterated, autoattack):
        honest = module.break_images

        def counting(surface, x, label, *args, honest=honest, **kwargs):
            broken = honest(surface, x, label, *args, **kwargs)
            seen.append((len(label), int(broken.sum())))
            return broken

        monkeypatch.setattr(module, "break_images", counting)
    plan = Plan(lambdas=(0.3,), attack=SEVERAL)
    code = run_plan(perturbed_network(), batches(digits), plan).of(0.3)
    left = [int((code != CLEAN).sum())]
    for _, broke in seen:
        left.append(left[-1] - broke)
    assert [count for count, _ in seen] == left[:-1]
    assert left[-1] == (code == ROBUST).sum() and sum(broke > 0 for _, broke in seen) >= 2


def shared(world, data, folder):
    network, images = perturbed_network(), batches(open_prepared(data, "digits"), 20, 50)
    outcome = run_plan(network, images, FULL, world=world, folder=pathlib.Path(folder))
    return outcome.code_CM, evaluate(network, images, LAMBDAS, ATTACK, world=world)


@pytest.mark.dist
def test_two_ranks_that_go_on_where_one_was_killed_judge_every_image_as_one_undisturbed_rank(
    digits, tmp_path, monkeypatch
):
    network, images = perturbed_network(), batches(digits, 20, 50)
    undisturbed = run_plan(network, images, FULL)
    assert len(undisturbed.code_CM.unique()) >= 4, "several attacks should have broken something"
    points = evaluate(network, images, LAMBDAS, ATTACK)

    kill_after(monkeypatch, 20)
    with pytest.raises(KeyboardInterrupt):
        run_plan(network, images, FULL, folder=tmp_path)
    monkeypatch.undo()
    (log,) = tmp_path.iterdir()
    whole = log.read_text().splitlines()
    log.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:30])
    for code_CM, shared_points in run_ranks(shared, 2, str(digits.folder.parent), str(tmp_path)):
        assert torch.equal(code_CM, undisturbed.code_CM)
        assert shared_points == points


def kill_after(monkeypatch, units: int) -> None:
    """Let a process die right after it wrote down that many units."""
    honest, done = UnitLog.add, []

    def add(log, *args):
        honest(log, *args)
        done.append(args)
        if len(done) == units:
            raise KeyboardInterrupt

    monkeypatch.setattr(UnitLog, "add", add)


def test_a_resumed_evaluation_does_nothing_twice_and_another_one_uses_nothing_of_it(digits, tmp_path, monkeypatch):
    network, images = perturbed_network(), batches(digits, 90)
    plan = Plan(lambdas=(0.0, 1.0), attack=ATTACK)
    undisturbed = run_plan(network, images, plan)
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run_plan(network, images, plan, folder=tmp_path)
    seen = []
    honest = UnitLog.add
    monkeypatch.setattr(UnitLog, "add", lambda log, *args: (seen.append(args[0]), honest(log, *args)))
    resumed = run_plan(network, images, plan, folder=tmp_path)
    assert torch.equal(resumed.code_CM, undisturbed.code_CM) and len(seen) == 8 - 5
    for other in (dataclasses.replace(plan, seed=1), dataclasses.replace(plan, attack=EvaluationAttack(eps=0.2))):
        seen.clear()
        run_plan(network, images, other, folder=tmp_path)
        assert len(seen) == 8
    with torch.no_grad():
        next(network.parameters()).add_(1e-3)
    seen.clear()
    run_plan(network, images, plan, folder=tmp_path)
    assert len(seen) == 8
    forget_units(tmp_path, resumed.fingerprint)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_output_that_cannot_be_written_is_named_before_anything_is_computed(digits, tmp_path):
    with pytest.raises(UserError, match=r"unfinished_.*: cannot be written: No such file"):
        run_plan(broken_network(), batches(digits), Plan(lambdas=(0.0,), attack=ATTACK), folder=tmp_path / "missing")


def broken_network():
    network = perturbed_network()
    network.attack_logits = None  # calling it would fail
    return network


def test_gradients_in_bfloat16_break_only_what_float32_confirms(digits):
    network, images = perturbed_network(), batches(digits)
    attack = EvaluationAttack(eps=0.02, steps=4)
    exact = run_plan(network, images, Plan(lambdas=LAMBDAS, attack=attack))
    rough = run_plan(network, images, Plan(lambdas=LAMBDAS, attack=attack, precision="bf16"))
    assert torch.equal(rough.code_CM == CLEAN, exact.code_CM == CLEAN)
    assert ((rough.code_CM == 1) != (exact.code_CM == 1)).double().mean() < 0.05
    # At radius 0 only the clean image can be asked about: what bfloat16 alone finds wrong must not count.
    still = Plan(lambdas=LAMBDAS, attack=EvaluationAttack(eps=0.0, steps=2), precision="bf16")
    assert (run_plan(network, images, still).code_CM <= CLEAN).all()


def test_the_report_of_an_attack_spells_out_its_defaults():
    assert EvaluationAttack(eps=8 / 255, steps=20).to_dict() == {
        "name": "pgd-20", "eps": 8 / 255, "steps": 20, "norm": "linf", "step_size": pytest.approx(10 / 255 / 20),
        "restarts": 1, "success": "any iterate",
    }  # fmt: skip
    assert EvaluationAttack(eps=0.1, restarts=5).name == "pgd-20x5"
