"""Optimiser, learning rate as a pure function of the step, and averaged weights."""

import copy
import math

import torch
from torch import nn

from oat_dist.config import OptimConfig
from oat_dist.muon import Muon


def build_optimizer(network: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimiser, its parameters in groups of equal weight decay and learning rate.

    The rate of a group is `learning_rate` times its "lr_factor".
    """
    decayed = set(layer_weights(network) if cfg.decay == "weights" else network.parameters())
    of_muon = {p for p in layer_weights(network) if p.dim() == 4} if cfg.optimizer == "muon" else set()
    members: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        factor = cfg.film_lr if _is_of_film(name) else 1.0
        factor = cfg.muon_lr / cfg.lr if parameter in of_muon else factor
        kind = cfg.weight_decay if parameter in decayed else 0.0, factor, parameter in of_muon
        members.setdefault(kind, []).append(parameter)
    # Decayed ones first, each kind in the order of the network.
    groups = [
        {"params": members[kind], "weight_decay": kind[0], "lr_factor": kind[1], "orthogonal": kind[2]}
        for kind in sorted(members, reverse=True)
    ]
    if cfg.optimizer == "muon":
        return Muon(groups, lr=cfg.peak_lr, momentum=cfg.momentum, nesterov=cfg.nesterov)
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=cfg.peak_lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, nesterov=cfg.nesterov
        )
    return torch.optim.AdamW(groups, lr=cfg.peak_lr, weight_decay=cfg.weight_decay)


def layer_weights(network: nn.Module) -> list[nn.Parameter]:
    """Weights of convolutions and linear layers, but not of those that make FiLM's scale and shift."""
    return [
        module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not _is_of_film(name)
    ]


def _is_of_film(name: str) -> bool:
    """Whether a module or parameter of this name makes FiLM's scale and shift."""
    return any(part.startswith("film") for part in name.split("."))


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
    return [*(p.detach() for p in network.parameters()), *running_statistics(network)]


def running_statistics(network: nn.Module) -> list[torch.Tensor]:
    """Running means and variances of a network's norms."""
    return [b for name, b in network.named_buffers() if "running_" in name]
