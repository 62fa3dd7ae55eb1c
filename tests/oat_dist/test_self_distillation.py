"""The lambda = 0 branch teaches the others: exact targets, a teacher that is a constant, and nothing at share 0."""

import copy
import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F

from oat_dist import step as step_module
from oat_dist.config import AttackConfig, ConditioningConfig, Config, LossConfig, ModelConfig, fingerprint
from oat_dist.config_io import load_config
from oat_dist.cost import training_cost
from oat_dist.dedicated import dedicated_config
from oat_dist.errors import UserError
from oat_dist.step import training_losses
from tests.oat_dist.test_step import _NoWaiting, disturbed, make_batch

LAM = torch.tensor([0, 0, 0.1, 0.4, 1, 1], dtype=torch.float64)
SHARE, SMOOTHING = 0.4, 0.2


def make(share=SHARE, **settings) -> Config:
    loss = {"self_distillation": share, "label_smoothing": SMOOTHING} | settings.pop("loss", {})
    return Config(attack=AttackConfig(eps_255=76.5, steps=2), loss=LossConfig(**loss), **settings)


CASES = {
    "dual": {},
    "single": {"conditioning": ConditioningConfig(norm="single")},
    "shared statistics, table": {"conditioning": ConditioningConfig(norm="shared_statistics", film="table")},
    "without the clean images of lambda 1": {"loss": {"clean_at_one": False}},
    "half the width": {"model": ModelConfig(widths=(0.5, 1.0))},
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_labels_mixed_with_the_answer_at_lambda_zero(case):
    config = make(**copy.deepcopy(CASES[case]))
    width = config.model.widths[0]
    network, batch, outputs = disturbed(config), make_batch(6), []
    before = copy.deepcopy(network)

    def forward(x, cond):
        outputs.append(network(x, cond))
        return outputs[-1]

    losses = training_losses(network, batch, LAM, config=config, epoch=0, forward=forward, width=width)

    answer = before.eval().predict(batch.image_NCHW[2:], 0.0, width=width).softmax(1)
    target = (1 - SMOOTHING) * F.one_hot(batch.label_N, 10).double() + SMOOTHING / 10
    target[2:] = (1 - SHARE) * target[2:] + SHARE * answer
    num_clean = 6 if config.loss.clean_at_one else 4
    logp = outputs[0].detach().log_softmax(1)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[:num_clean] -= ((1 - LAM)[:, None] * target)[:num_clean].mul(logp[:num_clean]).sum(1)
    expected[2:] -= LAM[2:] * (target[2:] * logp[num_clean:]).sum(1)
    torch.testing.assert_close(losses.loss_N.detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_teacher_is_a_constant_that_moves_nothing():
    config = make()
    taught, plain = disturbed(config), disturbed(config)
    batch = make_batch(6)
    losses = training_losses(taught, batch, LAM, config=config, epoch=0, forward=taught)
    training_losses(plain, batch, LAM, config=make(0.0), epoch=0, forward=plain)
    for (name, ours), theirs in zip(taught.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(module.training for module in taught.modules())
    # The loss of the last image, lambda = 1, reaches the norms of lambda = 0 neither through its logits nor its target.
    losses.loss_N[-1].backward()
    assert all(site.weight.grad is None or not site.weight.grad[0].any() for site in taught.sites)
    assert any(site.weight.grad[1].any() for site in taught.sites)


def test_without_a_share_nothing_is_asked_and_every_loss_is_the_same_bit_for_bit(monkeypatch):
    config = make(0.0)
    unset = dataclasses.replace(config, loss=LossConfig(label_smoothing=SMOOTHING))
    assert fingerprint(config) == fingerprint(unset)
    taught = make()
    only_zeros = torch.zeros(6, dtype=torch.float64)
    network = disturbed(config)
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "answers_at_zero", None)
        for lam, one in ((LAM, config), (only_zeros, taught)):
            step = training_losses(network, make_batch(6), lam, config=one, epoch=0, forward=network)
            assert step.loss_N.isfinite().all()
    losses = [
        training_losses(n := disturbed(c), make_batch(6), only_zeros, config=c, epoch=0, forward=n).loss_N
        for c in (config, taught)
    ]
    assert torch.equal(*losses), "images with lambda = 0 learn labels alone"


def test_no_operator_of_the_teaching_makes_the_host_wait_for_the_device(monkeypatch):
    config = make()
    network, batch = disturbed(config), make_batch(6)
    # Conditions are made from lambdas on the host.
    conditions = {lam_N.max().item(): network.condition(lam_N) for lam_N in (LAM, torch.zeros(4, dtype=torch.float64))}
    monkeypatch.setattr(type(network), "condition", lambda self, lam_N, **told: conditions[max(lam_N.numpy())])
    monkeypatch.setattr(sys.modules["kernels.checks"], "_check_index", lambda *a: None)
    with _NoWaiting():
        losses = training_losses(network, batch, LAM, config=config, epoch=0, forward=network)
        losses.loss_N.sum().backward()


WRONG = {
    "--loss.self_distillation=1": "loss.self_distillation=1.0: must lie in [0, 1)",
    "--loss.self_distillation=-0.1": "loss.self_distillation=-0.1: must lie in [0, 1)",
    "--loss.self_distillation=0.5 --loss.robust=trades": "loss.self_distillation=0.5: must be 0 with "
    "loss.robust=trades; only pgd_at has a target to share",
    "--loss.self_distillation=0.5 --conditioning.lambdas=[1] --conditioning.norm=single": "loss.self_distillation=0.5: "
    "needs lambda = 0 in training, which is the teacher",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_cannot_be_taught_is_refused_in_one_line_that_names_the_key(arguments):
    with pytest.raises(UserError) as error:
        load_config(arguments.split())
    assert str(error.value) == WRONG[arguments]


def test_it_costs_a_forward_pass_per_attacked_image_and_dedicated_networks_have_no_teacher():
    def units(config):
        shape = {"in_channels": 1, "image_size": (8, 8), "num_classes": 10, "num_train_images": 256}
        return training_cost(config, **shape).units_per_image

    assert units(make()) - units(make(0.0)) == pytest.approx(5 / 6)
    for lam in (0.0, 1.0):
        assert fingerprint(dedicated_config(make(), lam, 0)) == fingerprint(dedicated_config(make(0.0), lam, 0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_targets_are_float32_probabilities_in_either_precision(precision):
    config = dataclasses.replace(make(), engine=dataclasses.replace(make().engine, precision=precision))
    network, batch = disturbed(config, dtype=torch.float32), make_batch(6, dtype=torch.float32)
    answer = step_module.answers_at_zero(network, batch.image_NCHW, config=config)
    assert answer.dtype == torch.float32 and not answer.requires_grad
    torch.testing.assert_close(answer.sum(1), torch.ones(6))
    exact = copy.deepcopy(network).eval().predict(batch.image_NCHW, 0.0).softmax(1)
    torch.testing.assert_close(answer, exact, atol=1e-6 if precision == "fp32" else 0.03, rtol=0)
