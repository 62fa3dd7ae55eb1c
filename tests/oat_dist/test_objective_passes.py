"""Passes through the network that each objective makes, counted, and equal to the declared cost."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from oat_dist.config import AttackConfig, ConditioningConfig, Config, DataConfig, LossConfig
from oat_dist.cost import forward_flops, training_cost
from oat_dist.losses import ROBUST
from oat_dist.losses.__main__ import passes
from oat_dist.models import build_model
from oat_dist.step import training_losses
from tests.oat_dist.test_step import make_batch

# Of one attacked image: (forwards, backwards) of the attack, then images in the training forward: whether the clean one
# has to be there, and others. A training image has one backward, or two of which one is gone through again.
WRITTEN_OUT = {
    "fgsm": ((1, 1), True, 1),
    "min_max": ((1, 1), False, 1),
    "pgd_at": ((7, 7), False, 1),
    "alp": ((10, 10), True, 1),
    "trades": ((1 + 10, 10), True, 1),
    "mart": ((10, 10), True, 1),
    "llr": ((1 + 10, 1 + 10), True, 1),
    "tla": ((7, 7), True, 1),
    "fgsm_rs": ((1, 1), False, 1),
    "n_fgsm": ((1, 1), False, 1),
    "grad_align": ((1, 1), True, 2),
    "rst_adv": ((1 + 10, 10), True, 1),
    "rst_stab": ((0, 0), True, 1),
}
DIFFERENTIATED = ("llr", "grad_align")
MIXED = (0.0, 0.0, 0.1, 1.0, 1.0, 0.4)


def data_of(name: str) -> DataConfig:
    """Names extra data where the objective trains on some; nothing is read."""
    return DataConfig(extra="more" if "extra_data" in ROBUST[name].needs else None)


def dedicated(name: str, **loss) -> Config:
    conditioning = ConditioningConfig(lambdas=(1.0,), film="none", norm="single")
    clean_at_one = WRITTEN_OUT[name][1] if "clean_at_one" not in loss else loss.pop("clean_at_one")
    return Config(
        conditioning=conditioning, data=data_of(name), loss=LossConfig(robust=name, clean_at_one=clean_at_one, **loss)
    )


def counted(config: Config, lam) -> tuple[int, int, int]:
    """Images that go forward, backward, and backward through a backward pass in one step of a ResNet-8."""
    network, counts = build_model(config, in_channels=1, num_classes=10).double(), [0, 0, 0]

    def backward(grad):
        counts[1] += len(grad)
        if grad.requires_grad:  # made to be differentiated
            grad.register_hook(lambda second: counts.__setitem__(2, counts[2] + len(second)))

    def forward(module, args, output):
        counts[0] += len(output)

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(backward)

    network.stem.register_forward_hook(forward)
    # Not at the first convolution: the operators ask for gradients to their own input on the way, which hooks see too.
    network.classifier.register_forward_hook(watch)
    batch, lam = make_batch(len(lam)), torch.tensor(lam, dtype=torch.float64)
    training_losses(network, batch, lam, config=config, epoch=0, forward=network).loss_N.sum().backward()
    return tuple(counts)


@pytest.mark.parametrize("name", ROBUST)
def test_passes_of_a_dedicated_network_are_those_of_the_equations(name):
    (forwards, backwards), needs_clean, others = WRITTEN_OUT[name]
    images = needs_clean + others
    second = images if name in DIFFERENTIATED else 0
    expected = (forwards + images, backwards + images + second, second)
    assert counted(dedicated(name), (1.0,) * 4) == tuple(4 * n for n in expected)
    assert passes(ROBUST[name]) == expected, "what docs/objectives.md says"


@pytest.mark.parametrize("name", ROBUST)
def test_passes_of_mixed_lambdas_are_those_of_the_attacked_images_and_all_clean_ones(name):
    (forwards, backwards), _, others = WRITTEN_OUT[name]
    trained = 6 + 4 * others
    second = trained if name in DIFFERENTIATED else 0
    config = Config(data=data_of(name), loss=LossConfig(robust=name))
    assert counted(config, MIXED) == (4 * forwards + trained, 4 * backwards + trained + second, second)


SHAPE = {"in_channels": 1, "image_size": (8, 8), "num_classes": 10, "num_train_images": 250}


@pytest.mark.parametrize("name", ROBUST)
def test_the_declared_cost_is_that_of_the_passes(name):
    (forwards, backwards), needs_clean, others = WRITTEN_OUT[name]
    unit = 6 if name in DIFFERENTIATED else 3
    cost = training_cost(dedicated(name), **SHAPE)
    assert cost.units_per_image == pytest.approx(forwards + backwards + unit * (needs_clean + others))


@pytest.mark.parametrize(("name", "attack", "unit", "others"), [("trades", 21, 3, 1), ("grad_align", 2, 6, 2)])
def test_the_declared_cost_goes_with_the_share_of_attacked_images(name, attack, unit, others):
    conditioning = ConditioningConfig(lambdas=(0.0, 1.0), weights=(1.0, 3.0))
    cost = training_cost(Config(loss=LossConfig(robust=name), conditioning=conditioning), **SHAPE)
    assert cost.units_per_image == pytest.approx(0.75 * attack + unit * (1 + 0.75 * others))


class _Convolutions(TorchDispatchMode):
    """Counts the FLOPs of convolutions, forwards and backwards of any order."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if "convolution" in str(func):
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


@pytest.mark.parametrize("name", ["pgd_at", "trades", "llr", "grad_align"])
def test_the_declared_cost_is_that_of_the_convolutions_that_run(name):
    config = dataclasses.replace(dedicated(name), attack=AttackConfig(steps=1 if name == "grad_align" else 2))
    network = build_model(config, in_channels=1, num_classes=10)
    units = training_cost(config, **SHAPE).units_per_image
    lam, batch = torch.ones(4, dtype=torch.float64), make_batch(4, dtype=torch.float32)
    with _Convolutions() as counter:
        training_losses(network, batch, lam, config=config, epoch=0, forward=network).loss_N.sum().backward()
    # The first convolution, a sixtieth of all, has no backward to the images in training, and classifiers are apart.
    # PyTorch works out the second backward of strided convolutions for more pixels than there are.
    assert counter.flops / 4 == pytest.approx(units * forward_flops(network, (1, 8, 8)), rel=0.04)
