"""precision=bf16: products in bfloat16, all that accumulates in float32, and every weight cast once per step."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oat_dist.config import EngineConfig
from oat_dist.step import attack_images, training_losses
from tests.oat_dist.test_step import disturbed, make, make_batch

LAM = torch.tensor([0.1, 0.1, 0.3, 1, 1, 1], dtype=torch.float64)


def make_config(precision="bf16", **attack):
    return dataclasses.replace(make(**attack), engine=EngineConfig(precision=precision))


def attacked(network, config, frozen):
    batch = make_batch(6, dtype=torch.float32)
    return attack_images(network, frozen, batch.image_NCHW, batch.label_N, batch.index_N, config=config, epoch=0)


class _Casts(TorchDispatchMode):
    """Counts casts of tensors with given shapes to bfloat16."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16 and "_to_copy" in str(func):
            self.count += tuple(out.shape) in self.shapes
        return out


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_weights_cast_once_give_the_images_of_weights_cast_in_every_forward(norm):
    config = make_config()
    config = dataclasses.replace(config, attack=dataclasses.replace(config.attack, norm=norm))
    network = disturbed(config, dtype=torch.float32)
    cond = network.condition(LAM)
    once = attacked(network, config, network.freeze(cond, dtype=torch.bfloat16))
    every_time = attacked(network, config, network.freeze(cond))
    assert once.dtype == torch.float32 and torch.equal(once, every_time)


def test_a_step_casts_every_weight_of_the_attack_once_and_of_training_once():
    config = make_config()
    network = disturbed(config, dtype=torch.float32)
    weights = [p for n, p in network.named_parameters() if p.dim() == 4 or n.startswith("classifier")]

    def forward(x, cond):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x, cond)

    with _Casts({tuple(w.shape) for w in weights}) as casts:
        training_losses(network, make_batch(6, dtype=torch.float32), LAM, config=config, epoch=0, forward=forward)
    assert config.attack.steps == 3 and casts.count == 2 * len(weights)


def test_losses_iterates_statistics_and_folded_sites_are_float32_and_close_to_those_of_float32():
    results = {}
    for precision in ("fp32", "bf16"):
        config = make_config(precision)
        network = disturbed(config, dtype=torch.float32)
        given = []

        def forward(x, cond, network=network, given=given, is_bf16=precision == "bf16"):
            given.append((x, cond))
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                return network(x, cond)

        lam = torch.tensor([0, 0, 0.1, 0.4, 1, 1], dtype=torch.float64)
        step = training_losses(
            network, make_batch(6, dtype=torch.float32), lam, config=config, epoch=0, forward=forward
        )
        step.loss_N.sum().backward()
        (x, cond), *_ = given
        assert x.dtype == step.loss_N.dtype == torch.float32
        assert all(t.dtype == torch.float32 for film in cond.films if film for t in film)
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())
        assert all(b.dtype == torch.float32 for n, b in network.named_buffers() if "running_" in n)
        results[precision] = step.loss_N.detach()
    assert not torch.equal(results["bf16"], results["fp32"])
    torch.testing.assert_close(results["bf16"].mean(), results["fp32"].mean(), rtol=0.05, atol=0)
