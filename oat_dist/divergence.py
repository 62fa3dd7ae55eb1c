"""A loss or a weight that is not finite stops the run, and says for which lambdas it happened.

The loss is watched on the device without waiting for it; the trainer asks on log steps and before everything that is
written, when it waits anyway. So no checkpoint and no model is ever of a state that is not finite.

Letters: N images, B bins of lambda: 0, (0, 0.1], ... (0.9, 1].
"""

from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from oat_dist.checkpoint import Checkpoint
from oat_dist.distributed import World
from oat_dist.errors import NonFiniteError

TENTHS_B = torch.tensor([tenth / 10 for tenth in range(11)], dtype=torch.float64)
LAMBDA_BINS = (
    "0",
    *(f"({low:g},{high:g}]" for low, high in zip(TENTHS_B[:-1].tolist(), TENTHS_B[1:].tolist(), strict=True)),
)
_NEVER = 2**62
_MOST_NAMES = 3


class LossWatch:
    """Remembers, on the device, the first step with a loss that is not finite and the lambdas of its images."""

    def __init__(self, world: World) -> None:
        """Nothing bad yet.

        Args:
            world: The ranks, which stop together.
        """
        self.world = world
        self._step = -1
        self._first = torch.full((), _NEVER, dtype=torch.int64, device=world.device)
        self._first_gradient = self._first.clone()
        self._counts_2B = torch.zeros(2, len(LAMBDA_BINS), dtype=torch.int64, device=world.device)

    @torch.no_grad()
    def add(self, step: int, loss_N: Tensor, lam_N: Tensor) -> None:
        """Look at a micro-batch; nothing waits for the device.

        Args:
            step: Number of the optimiser step, from 1.
            loss_N: Per-image losses.
            lam_N: [N] float64 on the host.
        """
        bin_N = torch.searchsorted(TENTHS_B, lam_N).to(loss_N.device, non_blocking=True)
        bad_N = ~loss_N.isfinite()
        if step != self._step:
            self._step = step
            self._counts_2B *= self._first < _NEVER
        counts_2B = torch.zeros_like(self._counts_2B)
        counts_2B.index_add_(1, bin_N, torch.stack((bad_N, torch.ones_like(bad_N))).long())
        self._counts_2B += counts_2B * (self._first >= step)
        self._first = self._first.minimum(torch.where(bad_N.any(), step, _NEVER))

    @torch.no_grad()
    def add_gradient(self, step: int, norm: Tensor) -> None:
        """Look at the norm of a step's gradient, equal on all ranks; nothing waits for the device.

        Args:
            step: Number of the optimiser step, from 1.
            norm: Scalar.
        """
        is_bad = ~norm.to(self.world.device, non_blocking=True).isfinite()
        self._first_gradient = self._first_gradient.minimum(torch.where(is_bad, step, _NEVER))

    def check(self, last_good: Callable[[], Checkpoint | None]) -> None:
        """Stop if any loss or gradient so far was not finite; every rank must call, and the host waits.

        Args:
            last_good: Gives the newest checkpoint, on the main rank.

        Raises:
            NonFiniteError: On every rank, with the step, the lambdas and the last good checkpoint.
        """
        first = self.world.smallest(self._first)
        counts_2B = self.world.sum(self._counts_2B * (self._first == first))
        step, gradient_step, *counts = torch.cat(
            (torch.stack((first, self._first_gradient)), counts_2B.flatten())
        ).tolist()
        if min(step, gradient_step) == _NEVER:
            return
        if gradient_step < step:
            _stop(
                f"gradient is not finite at step {gradient_step}, every loss is", self.world, last_good, gradient_step
            )
        bad, seen = counts[: len(LAMBDA_BINS)], counts[len(LAMBDA_BINS) :]
        by_lambda = ", ".join(f"{name}: {b}/{n}" for name, b, n in zip(LAMBDA_BINS, bad, seen, strict=True) if n)
        _stop(
            f"loss is not finite at step {step} for {sum(bad)} of {sum(seen)} images; by lambda {by_lambda}",
            self.world,
            last_good,
            step,
        )


def require_finite(
    parts: Mapping[str, Mapping[str, Tensor]], step: int, *, world: World, last_good: Callable[[], Checkpoint | None]
) -> None:
    """Stop if what is about to be written is not finite; every rank must call, and the host waits.

    Args:
        parts: Name of the part -> name -> tensor, the same names on every rank.
        step: Optimiser steps done.
        world: The ranks.
        last_good: Gives the newest checkpoint, on the main rank.

    Raises:
        NonFiniteError: On every rank, with the names of what is not finite.
    """
    named = {f"{part} {name}": t for part, tensors in parts.items() for name, t in tensors.items()}
    named = {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}
    if not named:
        return
    bad = torch.stack([(~t.isfinite().all()).to(world.device, torch.int64) for t in named.values()])
    names = [name for name, ranks in zip(named, world.sum(bad).tolist(), strict=True) if ranks]
    if names:
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        _stop(f"not finite after step {step}: {', '.join(names[:_MOST_NAMES])}{more}", world, last_good)


def _stop(what: str, world: World, last_good: Callable[[], Checkpoint | None], bad_step: int | None = None) -> NoReturn:
    def stop() -> None:
        checkpoint = last_good()
        last = "none yet" if checkpoint is None else f"{checkpoint.folder} (step {checkpoint.step})"
        hint = "lower optim.lr, or set optim.clip_norm"
        if checkpoint is not None:
            hint += "; model.init_from takes its network.safetensors"
        error = NonFiniteError(f"{what}; last good checkpoint: {last}; {hint}")
        error.step = bad_step
        raise error

    world.on_main(stop)
