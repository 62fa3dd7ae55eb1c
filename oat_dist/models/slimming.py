"""Widths of a slimmable network: shares of the channels of every layer that make a network of their own.

Yu et al., "Slimmable Neural Networks" (ICLR 2019): all widths share convolutions and classifier, of which a narrower
one uses the leading channels, and each has norms of its own. The step trains every width, or those of the sandwich rule
(Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from oat_dist.config import ModelConfig
from oat_dist.errors import UserError
from oat_dist.random import permutation

if TYPE_CHECKING:
    from oat_dist.models.network import ConditionalNetwork

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Slimming:
    """Which widths a network has; the default is an ordinary network."""

    widths: tuple[float, ...] = (1.0,)
    """Increasing up to 1."""
    heads: bool = False
    """Whether every width has a classifier of its own."""

    @property
    def narrow(self) -> tuple[float, ...]:
        """All widths but 1."""
        return self.widths[:-1]

    def require(self, width: float, key: str = "width") -> None:
        """Check that the network has a width.

        Args:
            width: The width.
            key: What to call it in the message.

        Raises:
            UserError: It does not.
        """
        if width not in self.widths:
            there = ", ".join(f"{w:g}" for w in self.widths)
            raise UserError(f"{key}={width:g}: was not trained; the model.widths of this network are {there}")


WHOLE = Slimming()
"""An ordinary network."""


def channels_at(channels: int, width: float) -> int:
    """Channels of a layer at a width: the share, rounded half up."""
    return channels if width == 1 else math.floor(channels * width + 0.5)


def width_name(width: float) -> str:
    """A width in names of parameters, which must not contain a dot: 0.5 is 0_5."""
    return repr(float(width)).replace(".", "_")


def unfilled(make: Callable[[], M], like: Tensor) -> M:
    """A new module whose tensors have yet to be filled, on the device and in the dtype of a tensor.

    Neither the time of an initialisation is spent on it nor a random number.
    """
    with torch.device("meta"):
        module = make()
    return module.to_empty(device=like.device).to(like.dtype)


def widths_per_step(cfg: ModelConfig) -> int:
    """How many widths every training step has."""
    count = len(cfg.widths)
    return count if cfg.width_rule == "all" else min(count, 2 + cfg.width_samples)


def widths_of_step(cfg: ModelConfig, seed: int, step: int) -> tuple[float, ...]:
    """Widths that a training step trains, the largest first, the same on every rank.

    Args:
        cfg: `model.widths` and the rule.
        seed: Seed of the run.
        step: Optimiser steps done.
    """
    middle = list(cfg.widths[1:-1])
    if cfg.width_rule == "sandwich":
        order = permutation(len(middle), seed, "widths of a step", step).tolist()
        middle = [middle[at] for at in order[: cfg.width_samples]]
    return tuple(sorted({cfg.widths[0], *middle, cfg.widths[-1]}, reverse=True))


def idle_parameters(network: "ConditionalNetwork", width: float) -> Iterator[nn.Parameter]:
    """Parameters that take no part in a training forward of a width: norms and heads of the other widths.

    The noise strengths of conditioning.kind=float are among them: a micro-batch may have no image with lambda > 0.
    """
    of_whole = {f"{site.name}.{name}" for site in network.sites for name in ("weight", "bias")}
    if network.slimming.heads:
        of_whole |= {"classifier.weight", "classifier.bias"}
    for name, parameter in network.named_parameters():
        _, is_narrow, rest = name.partition(".narrow.")
        owner = rest.partition(".")[0] if is_narrow else width_name(1.0) if name in of_whole else width_name(width)
        if owner != width_name(width) or name.endswith(".alpha"):
            yield parameter
