"""The adversarial partners of training: the attack of a configuration on the frozen network, under its autocast.

And what else a step asks the frozen network. Letters: A attacked images, C channels, H, W, K classes.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from oat_dist.attacks import AttackPlan, ascend, at_least_float32, evaluation_mode, random_start
from oat_dist.config import Config
from oat_dist.graphed import GraphReplay
from oat_dist.losses import attack_plan
from oat_dist.models.condition import Frozen
from oat_dist.models.network import ConditionalNetwork
from oat_dist.random import draw_keys


def attack_images(
    network: ConditionalNetwork,
    frozen: Frozen,
    x: Tensor,
    label: Tensor,
    index: Tensor,
    *,
    config: Config,
    epoch: int,
    plan: AttackPlan | None = None,
    replay: GraphReplay | None = None,
) -> Tensor:
    """Adversarial partners of images by the attack of training, under its autocast.

    Args:
        network: The network; it is in evaluation mode during the attack and in its own mode again after.
        frozen: The network as constants, with the lambda of each image.
        x: [A, C, H, W] images in [0, 1].
        label: [A] classes.
        index: [A] dataset indices on the host, for the keys of the random starts.
        config: Configuration of the run.
        epoch: Part of the key.
        plan: The attack; default: that of the configuration in this epoch.
        replay: Runs it as one recorded graph; always the same for one network and plan.

    Returns:
        [A, C, H, W] adversarial images.
    """
    if len(x) == 0:
        return x
    plan = plan or attack_plan(config, epoch=epoch)
    start = plan.first_iterate(x, _keys("random start", x, index, config=config, epoch=epoch))

    if plan.steps == 0:
        return start

    def last_iterate(tensors: Sequence[Tensor]) -> Tensor:
        x, start, label, *constants = tensors
        told = frozen.with_tensors(constants)
        return ascend(lambda images: network.attack_logits(images, told), x, start, label, plan)

    tensors = [x, start, label, *frozen.tensors()]
    with evaluation_mode(network), _attack_autocast(x.device, config.engine.precision):
        return last_iterate(tensors) if replay is None else replay(last_iterate, tensors)


@torch.no_grad()
def answers_at_zero(network: ConditionalNetwork, x: Tensor, *, config: Config, width: float = 1.0) -> Tensor:
    """[A, K] probabilities that the network answers at lambda = 0, whatever lambda the images have.

    Its running statistics are constants here, and nothing moves them: one forward pass without a graph.

    Args:
        network: The network; its mode is restored.
        x: [A, C, H, W] images in [0, 1], at least one.
        config: Configuration of the run.
        width: Share of the channels.
    """
    cond = network.condition(torch.zeros(len(x), dtype=torch.float64), width=width)
    frozen = network.freeze(cond, dtype=attack_dtype(config.engine.precision))
    with _attack_autocast(x.device, config.engine.precision):
        logits = network.attack_logits(x, frozen)
    return at_least_float32(logits).softmax(1)


def noisy_images(x: Tensor, index: Tensor, *, config: Config, epoch: int) -> Tensor:
    """[A, C, H, W] uniform random points of the balls around images, other ones than the attack starts at."""
    key = _keys("noisy image", x, index, config=config, epoch=epoch)
    return random_start(x, key, eps=config.attack.eps, norm=config.attack.norm)


def _keys(purpose: str, x: Tensor, index: Tensor, *, config: Config, epoch: int) -> Tensor:
    """[A] keys of random points, by seed, epoch and image."""
    return draw_keys(config.seed, purpose, epoch, index.to(x.device, non_blocking=True))


def attack_dtype(precision: str) -> torch.dtype | None:
    """What the frozen weights are cast to, once per step; None keeps theirs."""
    return torch.bfloat16 if precision == "bf16" else None


def _attack_autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bfloat16 autocast for `bf16`, nothing for `fp32`."""
    if precision == "bf16":
        # The cache would only hold on to a copy of every iterate: the weights have the right dtype.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()
