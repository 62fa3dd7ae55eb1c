"""One training step up to the loss: condition once, attack the frozen network, one joint forward, per-image losses.

This is the whole algorithm of Wang et al., "Once-for-All Adversarial Training" (NeurIPS 2020, Algorithm 1), and knows
nothing of ranks or optimisers. Given the same adversarial images it equals the published three calls (clean forward,
adversarial forward, backward) in losses, gradients and running statistics; docs/numerics.md says where the adversarial
images differ. Nothing here waits for the device.

Letters: N images, A of them with lambda > 0, M of them in the clean part of the joint forward, K classes.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oat_dist.attacks import ascend, evaluation_mode, random_start
from oat_dist.config import Config
from oat_dist.data import Batch
from oat_dist.graphed import GraphReplay
from oat_dist.losses import once_for_all_loss, robust_term
from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.network import ConditionalNetwork
from oat_dist.random import draw_keys

Forward = Callable[[Tensor, Condition], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """Losses of one micro-batch and what is counted for the log."""

    loss_N: Tensor
    """Once-for-all loss of each image, with a graph."""
    counts: dict[str, Tensor]
    """Scalars on the device, to be summed over images, micro-batches and ranks."""
    num_clean: int
    """Images that took part clean, over which the clean counts go."""


def training_losses(
    network: ConditionalNetwork,
    batch: Batch,
    lam_N: Tensor,
    *,
    config: Config,
    epoch: int,
    forward: Forward,
    replay: GraphReplay | None = None,
) -> StepLosses:
    """Losses of a micro-batch.

    Args:
        network: The network, in training mode.
        batch: Images whose lambdas are `lam_N`, those with lambda = 0 first.
        lam_N: [N] float64 on the host.
        config: Configuration of the run.
        epoch: Epoch, part of the key of the random starts.
        forward: The training forward, (images, condition) -> logits; the network itself or an engine around it.
        replay: Runs the attack as one recorded graph; always the same for one network and configuration.

    Returns:
        Per-image losses and counts.
    """
    x, label_N = batch.image_NCHW.contiguous(memory_format=torch.channels_last), batch.label_N
    cond = network.condition(lam_N)
    attacked = slice(cond.num_zero, None)
    frozen = network.freeze(cond, dtype=_attack_dtype(config.engine.precision)).images(attacked)
    x_adv = attack_images(
        network, frozen, x[attacked], label_N[attacked], batch.index_N[attacked], config=config, epoch=epoch,
        replay=replay,
    )  # fmt: skip
    if config.model.dropout:
        _seed_dropout(config.seed, epoch, batch.index_N)
    clean_M = None if config.loss.clean_at_one else _clean_positions(lam_N, x.device)
    x_clean, clean_label = (x, label_N) if clean_M is None else (x[clean_M], label_N[clean_M])
    logits = forward(torch.cat((x_clean, x_adv)), cond.joint(clean_M))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    clean_logits, adv_logits = logits.split((len(x_clean), len(x_adv)))
    loss_N, clean_loss_M, robust_A = once_for_all_loss(
        clean_logits,
        adv_logits,
        label_N,
        lam_N.to(logits.device, logits.dtype, non_blocking=True),
        robust=robust_term(config.loss),
        label_smoothing=config.loss.label_smoothing,
        clean_M=clean_M,
    )
    with torch.no_grad():
        counts = {
            "loss": loss_N.sum(),
            "loss_clean": clean_loss_M.sum(),
            "loss_robust": robust_A.sum(),
            "correct_clean": (clean_logits.argmax(1) == clean_label).sum(),
            "correct_robust": (adv_logits.argmax(1) == label_N[attacked]).sum(),
        }
    counts = {key: value.detach() for key, value in counts.items()}
    return StepLosses(loss_N=loss_N, counts=counts, num_clean=len(x_clean))


def _clean_positions(lam_N: Tensor, device: torch.device) -> Tensor:
    """[M] positions of the images whose clean loss has weight, those with lambda < 1."""
    return (lam_N < 1).nonzero().flatten().to(device, non_blocking=True)


def _seed_dropout(seed: int, epoch: int, index_N: Tensor) -> None:
    """Seed torch's generator, the source of dropout masks, by run, epoch and first image of the micro-batch.

    So a resumed run draws the masks of an undisturbed one with no generator state in its checkpoint. Unlike every other
    draw, masks change with the number of ranks and with the device.
    """
    torch.manual_seed(draw_keys(seed, "dropout", epoch, index_N[:1]).tolist()[0])


def attack_images(
    network: ConditionalNetwork,
    frozen: Frozen,
    x: Tensor,
    label: Tensor,
    index: Tensor,
    *,
    config: Config,
    epoch: int,
    replay: GraphReplay | None = None,
) -> Tensor:
    """Adversarial partners of images by the attack of the configuration, under its autocast.

    Args:
        network: The network; it is in evaluation mode during the attack and in its own mode again after.
        frozen: The network as constants, with the lambda of each image.
        x: [A, C, H, W] images in [0, 1].
        label: [A] classes.
        index: [A] dataset indices on the host, for the keys of the random starts.
        config: Configuration of the run.
        epoch: Part of the key.
        replay: Runs it as one recorded graph; always the same for one network and configuration.

    Returns:
        [A, C, H, W] adversarial images.
    """
    cfg = config.attack
    if len(x) == 0:
        return x
    start = x
    if cfg.random_start:
        key = draw_keys(config.seed, "random start", epoch, index.to(x.device, non_blocking=True))
        start = random_start(x, key, eps=cfg.eps, norm=cfg.norm)

    def last_iterate(tensors: Sequence[Tensor]) -> Tensor:
        x, start, label, *constants = tensors
        told = frozen.with_tensors(constants)
        return ascend(
            lambda images: network.attack_logits(images, told), x, start, label,
            eps=cfg.eps, steps=cfg.steps, step_size=cfg.step_size, norm=cfg.norm,
        )  # fmt: skip

    tensors = [x, start, label, *frozen.tensors()]
    with evaluation_mode(network), _attack_autocast(x.device, config.engine.precision):
        return last_iterate(tensors) if replay is None else replay(last_iterate, tensors)


def _attack_dtype(precision: str) -> torch.dtype | None:
    """What the frozen weights are cast to, once per step; None keeps theirs."""
    return torch.bfloat16 if precision == "bf16" else None


def _attack_autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bfloat16 autocast for `bf16`, nothing for `fp32`."""
    if precision == "bf16":
        # The cache would only hold on to a copy of every iterate: the weights have the right dtype.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()
