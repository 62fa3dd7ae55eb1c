"""Optimiser, learning rate as a pure function of the step, and averaged weights."""

import copy
import math

import torch
from torch import nn

from oat_dist.config import OptimConfig


def build_optimizer(network: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW; weight decay on all parameters or on the weights of convolutions and classifier."""
    groups = [{"params": list(network.parameters())}]
    if cfg.decay == "weights":
        weights = set(_decayed(network))
        parts = ([p for p in network.parameters() if (p in weights) == is_weight] for is_weight in (True, False))
        groups = [
            {"params": part, "weight_decay": decay}
            for part, decay in zip(parts, (cfg.weight_decay, 0.0), strict=True)
            if part
        ]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=cfg.peak_lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, nesterov=cfg.nesterov
        )
    return torch.optim.AdamW(groups, lr=cfg.peak_lr, weight_decay=cfg.weight_decay)


def _decayed(network: nn.Module) -> list[nn.Parameter]:
    """Weights of convolutions and linear layers, but not of those that make FiLM's scale and shift."""
    return [
        module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not any(part.startswith("film") for part in name.split("."))
    ]


def learning_rate(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step.

    Args:
        cfg: Peak rate, schedule and warm-up.
        step: Step from 0.
        total_steps: Steps of the whole run.

    Returns:
        A linear rise over the warm-up, then cosine (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5) or linear
        (Smith and Topin, "Super-Convergence", 2018, section 2) decay towards 0, or the peak.
    """
    warmup_steps = cfg.warmup_share * total_steps
    if step < warmup_steps:
        return cfg.peak_lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if cfg.schedule == "cosine":
        return cfg.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.peak_lr * (1 - progress) if cfg.schedule == "onecycle" else cfg.peak_lr


class AveragedNetwork:
    """Exponential moving average of parameters and running statistics.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that a short run is not dominated by its start.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Start at the network as it is.

        Args:
            network: The network that is trained.
            decay: Largest decay per step, in [0, 1).
        """
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._mine, self._theirs = _averaged(self.network), _averaged(network)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the trained network after its step number `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mine, self._theirs, 1 - decay)


def _averaged(network: nn.Module) -> list[torch.Tensor]:
    """What moves during training: parameters and running statistics."""
    statistics = [b for name, b in network.named_buffers() if "running_" in name]
    return [*(p.detach() for p in network.parameters()), *statistics]
