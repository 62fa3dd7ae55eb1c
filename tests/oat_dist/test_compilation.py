"""A compiled network computes what it computed, under its own names; without a compiler one line says so."""

import dataclasses
from functools import partial

import pytest
import torch

from oat_dist import compilation
from oat_dist.compilation import require_compiler
from oat_dist.config import AttackConfig, Config, EngineConfig, OptimConfig
from oat_dist.errors import UserError
from oat_dist.models import MODELS, build_model
from oat_dist.models.resnet import ResNet
from oat_dist.step import training_losses
from tests.oat_dist.test_step import make_batch
from tests.ranks import run_ranks

STEPS = 3


def eager_and_compiled(world):
    """Of both: losses of some steps through DeepSpeed, names of the state, and number of graphs compiled."""
    from oat_dist.engine import init_world

    world = dataclasses.replace(init_world(threads=1), device=world.device)
    return [losses_of(world, is_compiled) for is_compiled in (False, True)]


def losses_of(world, is_compiled):
    from torch._dynamo.utils import counters

    from oat_dist.engine import Engine

    # One block of four channels compiles in a third of the time of the whole network.
    MODELS["resnet8"] = partial(ResNet, blocks=(1,), widths=(4,))
    config = Config(
        attack=AttackConfig(eps_255=76.5, steps=2),
        optim=OptimConfig(batch_size=6, lr=0.05),
        engine=EngineConfig(compile=is_compiled),
    )
    network = build_model(config, in_channels=1, num_classes=10)
    engine, losses = Engine(network, config, world), []
    lam = torch.tensor([0, 0, 0.1, 0.4, 1, 1], dtype=torch.float64)
    for epoch in range(STEPS):
        batch = make_batch(6, dtype=torch.float32)
        step = training_losses(network, batch, lam, config=config, epoch=epoch, forward=engine.forward)
        engine.backward_and_step(step.loss_N, config.optim.lr)
        losses.append(step.loss_N.detach())
    return torch.stack(losses), list(network.state_dict()), counters["stats"]["unique_graphs"]


@pytest.mark.dist
@pytest.mark.slow
def test_a_compiled_network_has_the_losses_and_the_names_of_an_eager_one():
    try:
        require_compiler(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    (((eager, names, none), (compiled, same_names, graphs)),) = run_ranks(eager_and_compiled, 1)
    assert (none, graphs) == (0, 2), "one graph for the training forward, one for the attack, whole and once"
    assert names == same_names and not any("_orig_mod" in name for name in names)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "variable", "message"),
    [("cpu", "CXX", r"needs a C\+\+ compiler \(g\+\+ not found\)"),
     ("cuda", "CC", r"needs a C compiler \(gcc or clang not found\)")],
)  # fmt: skip
def test_without_a_compiler_one_line_names_the_key(device, variable, message, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=f"^engine.compile=True: {message}.*set engine.compile=false$"):
        require_compiler(torch.device(device))
    monkeypatch.setenv(variable, "mycc")
    with pytest.raises(UserError, match=f"{variable}=mycc not found"):
        require_compiler(torch.device(device))
    monkeypatch.setattr(compilation.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "mycc" else None)
    require_compiler(torch.device(device))
