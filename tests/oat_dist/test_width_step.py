"""The step at several widths: separate computations summed, each with its own attack; distillation; recordings."""

import copy
import dataclasses
import pathlib

import pytest
import torch
import torch.nn.functional as F

from oat_dist import step as step_module
from oat_dist.config import AttackConfig, ConditioningConfig, Config, LossConfig, ModelConfig
from oat_dist.data import TrainLoader, open_prepared
from oat_dist.export import cut_config, cut_out
from oat_dist.graphed import GraphReplay
from oat_dist.models.slimming import widths_of_step
from oat_dist.step import training_losses
from oat_dist.training import Training
from tests.oat_dist.test_divergence import make_config
from tests.oat_dist.test_graphed import Again
from tests.oat_dist.test_step import disturbed, make_batch
from tests.ranks import run_ranks

LAM = torch.tensor([0, 0, 0.1, 0.4, 1, 1], dtype=torch.float64)


def make(**loss) -> Config:
    return Config(
        model=ModelConfig(widths=(0.5, 0.75, 1.0)),
        attack=AttackConfig(eps_255=76.5, steps=2),
        loss=LossConfig(**loss),
    )


def losses_at(network, config, width, **options):
    return training_losses(
        network, make_batch(6), LAM, config=config, epoch=0, forward=network, width=width, **options
    )  # fmt: skip


def test_the_gradients_of_a_step_are_those_of_separate_networks_summed():
    config = make()
    together, alone = disturbed(config), {}
    for width in widths_of_step(config.model, 0, 0):
        alone[width] = copy.deepcopy(together)
        losses_at(alone[width], config, width).loss_N.sum().backward()
    for width in widths_of_step(config.model, 0, 0):
        losses_at(together, config, width).loss_N.sum().backward()
    for name, parameter in together.named_parameters():
        parts = [dict(network.named_parameters())[name].grad for network in alone.values()]
        expected = sum(part for part in parts if part is not None)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12, msg=name)
    for name, buffer in together.named_buffers():
        narrow = [width for width in alone if f".narrow.{str(width).replace('.', '_')}." in name]
        torch.testing.assert_close(buffer, dict(alone[(narrow or [1.0])[0]].named_buffers())[name], rtol=0, atol=0)


@pytest.mark.parametrize("conditioning", [{}, {"film": "table", "norm": "shared_statistics"}], ids=["mlp", "table"])
def test_a_width_is_attacked_through_its_own_subnetwork(conditioning, monkeypatch):
    config = dataclasses.replace(make(), conditioning=ConditioningConfig(**conditioning))
    seen, attack = [], step_module.attack_images
    monkeypatch.setattr(step_module, "attack_images", lambda *a, **k: seen.append(attack(*a, **k)) or seen[-1])
    network = disturbed(config)
    narrow = cut_out(network, 0.5)
    losses = losses_at(network, config, 0.5).loss_N
    expected = losses_at(narrow, cut_config(config, 0.5), 1.0).loss_N
    losses_at(disturbed(config), config, 1.0)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(seen[0], seen[2])


@pytest.mark.parametrize("clean_at_one", [True, False])
def test_distilled_widths_learn_the_answers_of_the_whole_network(clean_at_one):
    config = make(distill_widths=True, clean_at_one=clean_at_one, label_smoothing=0.3, robust="pgd_at")
    network, answers = disturbed(config), []

    def forward(x, cond):
        answers.append(network(x, cond))
        return answers[-1]

    teacher = training_losses(network, make_batch(6), LAM, config=config, epoch=0, forward=forward)
    student = training_losses(
        network, make_batch(6), LAM, config=config, epoch=0, forward=forward, width=0.5, teacher=teacher
    )  # fmt: skip
    target, logits = answers[0].detach().softmax(1), answers[1]
    soft = F.cross_entropy(logits, target, reduction="none")
    clean, robust = soft[:-4], soft[-4:]
    expected = torch.zeros(6, dtype=torch.float64)
    expected[: len(clean)] += (1 - LAM[: len(clean)]) * clean
    expected[2:] += LAM[2:] * robust
    torch.testing.assert_close(student.loss_N, expected, rtol=1e-12, atol=1e-12)
    assert len(clean) == (6 if clean_at_one else 4)
    before = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    student.loss_N.sum().backward()
    assert before == [None] * len(before)
    assert network.stem_norm.weight.grad is None, "the teacher is a constant"


def test_recorded_attacks_of_several_widths_are_the_attacks():
    config, recorder = make(), Again()
    replay, results = GraphReplay(recorder, name="attack"), []
    for use in (None, replay):
        network = disturbed(config)
        for _ in range(2):
            results += [losses_at(network, config, width, replay=use).loss_N.detach() for width in (1.0, 0.75, 0.5)]
    assert all(torch.equal(a, b) for a, b in zip(results[:6], results[6:], strict=True))
    assert recorder.recorded == 3


SETTINGS = {
    "alone": ((1.0,), None),
    "beside little": ((0.5, 1.0), (1e-30, 1.0)),
    "beside its equal": ((0.5, 1.0), None),
    "written": ((0.5, 1.0), (1.0, 1.0)),
}


def whole_networks(world, root, folder):
    """The whole network after an epoch of each of `SETTINGS`, by the names that a network of one width has."""
    from oat_dist.engine import init_world

    world, found = dataclasses.replace(init_world(threads=1), device=world.device), {}
    for name, (widths, weights) in SETTINGS.items():
        config = dataclasses.replace(
            make_config(root, epochs=1), model=ModelConfig(widths=widths), loss=LossConfig(width_weights=weights)
        )
        data = open_prepared(root, "digits")
        loader = TrainLoader(data, config, rank=0, ranks=1, device=world.device)
        run = pathlib.Path(folder, name)
        run.mkdir()
        training = Training(config, data, loader, world=world, run=run, checkpoint=None)
        training.fit()
        states = training.network.state_dict().items()
        found[name] = torch.cat([value.flatten().float() for name, value in states if ".narrow." not in name])
    return found


@pytest.mark.dist
def test_a_width_counts_what_it_is_told_to(digits, tmp_path):
    (whole,) = run_ranks(whole_networks, 1, str(digits.folder.parent), str(tmp_path))
    torch.testing.assert_close(whole["beside little"], whole["alone"], rtol=0, atol=1e-6)
    assert torch.equal(whole["written"], whole["beside its equal"])
    assert (whole["written"] - whole["alone"]).abs().max() > 1e-3
