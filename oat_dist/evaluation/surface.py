"""What an attacker faces: the answers that count, and the logits it may differentiate.

They are the same function for the attacker who knows everything. They differ where gradients are cheap (bfloat16),
where the attacker goes through another lambda than the one that defends, and where lambda is drawn anew for every
query.

Letters: N images, K classes, L lambdas.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from oat_dist.attacks import LogitsFn
from oat_dist.models.condition import Frozen, FrozenDraws
from oat_dist.models.network import ConditionalNetwork
from oat_dist.random import draw_keys, integers


@dataclass(frozen=True, kw_only=True)
class Surface:
    """One defended network as an attacker sees it."""

    decide: LogitsFn
    """[N, K] logits that count, in the precision of the weights."""
    gradient: LogitsFn
    """[N, K] logits that the attacker differentiates."""
    screen: Literal["exact", "rough", "none"] = "exact"
    """What `gradient` says of `decide`: the same answers; nearly the same, worth asking `decide` only where they are
    wrong; or nothing."""
    is_random: bool = False
    """Whether the same image may get another answer next time; `gradient` is then an average over draws."""


class Surfaces:
    """Makes the surfaces of one network; every lambda is frozen once."""

    def __init__(
        self,
        network: ConditionalNetwork,
        lambdas: Sequence[float],
        *,
        precision: str = "fp32",
        width: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Freeze the network.

        Args:
            network: The network, in evaluation mode whenever a surface is used.
            lambdas: Every lambda that defends or is attacked through.
            precision: Of the gradients: `fp32`, or `bf16` under autocast. Answers are never in bfloat16.
            width: Share of the channels, one of the network's widths.
            seed: Seed of weight noise: a network that has some answers with the mean over the same draws always.
        """
        self.network, self.precision = network, precision
        distinct = sorted(set(lambdas))
        told = {"width": width, "seed": seed}
        self._exact = dict(zip(distinct, network.frozen_at(distinct, **told), strict=True))
        self._rough = self._exact
        if precision == "bf16":
            self._rough = dict(zip(distinct, network.frozen_at(distinct, **told, dtype=torch.bfloat16), strict=True))

    def fixed(self, lam: float, via: float | None = None) -> Surface:
        """The network at one lambda.

        Args:
            lam: The lambda that answers.
            via: The lambda that the attacker differentiates through; default: the same.
        """
        decide = self._logits_fn(lam)
        if via is not None and via != lam:
            return Surface(decide=decide, gradient=self._logits_fn(via, is_rough=True), screen="none")
        if self.precision == "bf16":
            return Surface(decide=decide, gradient=self._logits_fn(lam, is_rough=True), screen="rough")
        return Surface(decide=decide, gradient=decide)

    def random(self, lambdas: Sequence[float], draws: int, key: Tensor) -> Surface:
        """The network that draws one of `lambdas`, evenly, for every image of every query.

        The attacker differentiates the mean of the logits over draws of its own, expectation over transformations
        (Athalye et al., "Synthesizing Robust Adversarial Examples", ICML 2018, section 2).

        Args:
            lambdas: What is drawn from.
            draws: Draws that the attacker averages over.
            key: [1] key; the same key gives the same draws in the same order of queries.

        Raises:
            ValueError: The network has weight noise, which belongs to one lambda.
        """
        if self.network.is_stochastic:
            raise ValueError("lambdas: a network with weight noise has another for every lambda; draw none at random")
        rows = torch.tensor([self._exact[lam][1] for lam in lambdas])
        queries = iter(range(2**31))

        def logits(x: Tensor, *, is_rough: bool = False) -> Tensor:
            place = torch.arange(len(x))
            drawn = integers(draw_keys(0, "query", key, next(queries), place), 1, len(rows))[:, 0]
            frozen, _ = (self._rough if is_rough else self._exact)[lambdas[0]]
            return self._run(x, frozen.for_rows(rows[drawn].to(x.device)), is_rough)

        def averaged(x: Tensor) -> Tensor:
            stacked = logits(x.repeat(draws, 1, 1, 1), is_rough=True)
            return stacked.view(draws, len(x), -1).mean(0)

        return Surface(decide=logits, gradient=averaged, screen="none", is_random=True)

    def _logits_fn(self, lam: float, *, is_rough: bool = False) -> LogitsFn:
        frozen, row = (self._rough if is_rough else self._exact)[lam]
        return lambda x: self._run(x, frozen.for_row(row, len(x)), is_rough)

    def _run(self, x: Tensor, frozen: Frozen | FrozenDraws, is_rough: bool) -> Tensor:
        is_rough = is_rough and self.precision == "bf16"
        autocast = torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False)
        with autocast if is_rough else contextlib.nullcontext():
            logits = self.network.attack_logits(x, frozen)
        return logits.float() if is_rough else logits
