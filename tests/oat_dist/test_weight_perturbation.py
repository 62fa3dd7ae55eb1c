"""Adversarial weight perturbation: how far every layer moves, what a step then is, on any number of ranks."""

import copy
import dataclasses
import pathlib

import pytest
import torch

from oat_dist.conditioning import LambdaSampler
from oat_dist.config import AttackConfig, Config, DataConfig, EngineConfig, EvaluationConfig, ModelConfig, OptimConfig
from oat_dist.data import TrainLoader, open_prepared
from oat_dist.distributed import World
from oat_dist.errors import UserError
from oat_dist.models import build_model
from oat_dist.optim import layer_weights, learning_rate
from oat_dist.step import training_losses
from oat_dist.training import Training
from oat_dist.weight_perturbation import WeightPerturbation
from tests.oat_dist.test_step import disturbed, make_batch
from tests.ranks import run_ranks

GAMMA = 0.01
BATCH, STEPS = 400, 3
LAM = torch.tensor([0, 0, 0.2, 0.4, 1, 1], dtype=torch.float64)


def losses_of(network, x_adv=None):
    config = Config(attack=AttackConfig(eps_255=76.5, steps=2))
    return training_losses(network, make_batch(6), LAM, config=config, epoch=0, forward=network, x_adv=x_adv)


def test_every_layer_moves_by_a_share_of_its_norm_along_the_gradient_and_back_to_the_last_bit():
    network = disturbed(Config())
    state = copy.deepcopy(network.state_dict())
    weights = layer_weights(network)
    gradients = torch.autograd.grad(losses_of(copy_of := copy.deepcopy(network)).loss_N.sum(), layer_weights(copy_of))
    perturbation = WeightPerturbation(network, GAMMA, World())
    with perturbation.ascent():
        perturbation.add(losses_of(network).loss_N)
    names = {name for name, p in network.named_parameters() if any(p is weight for weight in weights)}
    assert len(weights) == len(names) > 5 and not any("film" in name for name in names)
    for weight, gradient, name in zip(weights, gradients, [n for n in state if n in names], strict=True):
        expected = state[name] + GAMMA * state[name].norm() * gradient / gradient.norm()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]) == (name not in names), name
    perturbation.restore()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_the_perturbed_weights_lose_more_on_the_images_that_they_were_perturbed_for():
    network = disturbed(Config())
    perturbation = WeightPerturbation(network, 1e-3, World())
    with perturbation.ascent():
        before = losses_of(network)
        perturbation.add(before.loss_N)
    after = losses_of(network, before.x_adv)
    assert torch.equal(after.x_adv, before.x_adv) and after.loss_N.sum() > before.loss_N.sum()


def test_a_gradient_that_is_not_finite_is_undone_as_well():
    network = disturbed(Config())
    before = [weight.detach().clone() for weight in layer_weights(network)]
    perturbation = WeightPerturbation(network, GAMMA, World())
    with perturbation.ascent():
        perturbation.add(losses_of(network).loss_N * torch.nan)
    assert not torch.isfinite(layer_weights(network)[0]).any()
    perturbation.restore()
    assert all(torch.equal(*pair) for pair in zip(layer_weights(network), before, strict=True))


def make_config(root, **engine) -> Config:
    """Three steps on the digits, the first one without perturbation; without momentum steps are easy to follow."""
    return Config(
        data=DataConfig(root=root, loader="memory", shift_pixels=1),
        attack=AttackConfig(eps_255=0.0, steps=1),
        optim=OptimConfig(
            batch_size=BATCH, lr=0.05, epochs=1, momentum=0.0, nesterov=False, awp_gamma=GAMMA, awp_warmup_share=0.1
        ),
        evaluation=EvaluationConfig(lambdas=(0.0, 1.0)),
        logging=dataclasses.replace(Config().logging, tensorboard=False),
        engine=EngineConfig(sync_statistics=True, **engine),
    )


ENGINES = {"zero 0": {}, "zero 2, accumulating": {"zero_stage": 2, "accumulation": 2}}


def trained_weights(world, root, folder):
    """Engine -> weights and statistics after all steps of `make_config`, through DeepSpeed."""
    from oat_dist.engine import init_world

    world, found = dataclasses.replace(init_world(threads=1), device=world.device), {}
    for name, engine in ENGINES.items():
        config, data = make_config(root, **engine), open_prepared(root, "digits")
        loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
        run = pathlib.Path(folder, f"{world.ranks} {name}")
        run.mkdir(exist_ok=True)
        training = Training(config, data, loader, world=world, run=run, checkpoint=None)
        training.fit()
        found[name] = {key: value.clone() for key, value in training.network.state_dict().items()}
    return found


def by_hand(root, engine):
    """The same steps with plain PyTorch."""
    config, data = make_config(root, **engine), open_prepared(root, "digits")
    loader = TrainLoader(data, config, rank=0, ranks=1, device=torch.device("cpu"))
    sampler = LambdaSampler(config.conditioning, seed=config.seed, batch_size=BATCH, steps_per_epoch=STEPS)
    network = build_model(config, in_channels=1, num_classes=10)
    for step, batches in enumerate(loader.epoch(0)):

        def add_gradients(to, batches=batches, step=step):
            for batch in batches:
                lam_N = sampler.draw(0, step, batch.position_N, batch.index_N)
                losses = training_losses(to, batch, lam_N, config=config, epoch=0, forward=to, step=step)
                (losses.loss_N.sum() / BATCH).backward()
            return to

        elsewhere = copy.deepcopy(network)
        if step >= 1:
            here = add_gradients(copy.deepcopy(network))
            with torch.no_grad():
                for weight, at in zip(layer_weights(elsewhere), layer_weights(here), strict=True):
                    weight += GAMMA * weight.norm() * at.grad / at.grad.norm()
        add_gradients(elsewhere)
        lr, decay = learning_rate(config.optim, step, STEPS), config.optim.weight_decay
        with torch.no_grad():
            for parameter, moved in zip(network.parameters(), elsewhere.parameters(), strict=True):
                parameter -= lr * (moved.grad + decay * parameter)
            for buffer, moved in zip(network.buffers(), elsewhere.buffers(), strict=True):
                buffer.copy_(moved)
    return network.state_dict()


@pytest.mark.dist
@pytest.mark.slow
def test_a_step_takes_the_gradient_at_the_perturbed_weights_on_any_number_of_ranks(digits, tmp_path):
    root = str(digits.folder.parent)
    torch.set_num_threads(1)
    expected = {name: by_hand(root, engine) for name, engine in ENGINES.items()}
    for ranks in (1, 2):
        for found in run_ranks(trained_weights, ranks, root, str(tmp_path)):
            for engine, weights in found.items():
                for name, value in expected[engine].items():
                    torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=f"{engine} {name}")


@pytest.mark.parametrize(("optim", "model", "named"), [
    ({"awp_gamma": 1.0}, {}, "optim.awp_gamma=1.0: must lie in"),
    ({"awp_gamma": -0.1}, {}, "optim.awp_gamma=-0.1: must lie in"),
    ({"awp_warmup_share": 0.1}, {}, "optim.awp_warmup_share=0.1: needs optim.awp_gamma > 0"),
    ({"awp_gamma": 0.1, "awp_warmup_share": 1.0}, {}, "optim.awp_warmup_share=1.0: must lie in"),
    ({"awp_gamma": 0.1}, {"widths": (0.5, 1.0)}, "optim.awp_gamma=0.1: must be 0 with several model.widths"),
])  # fmt: skip
def test_settings_that_make_no_perturbation_are_refused(optim, model, named):
    with pytest.raises(UserError) as error:
        Config(optim=OptimConfig(**optim), model=ModelConfig(**model))
    assert named in str(error.value)
