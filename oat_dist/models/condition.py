"""What a network is told about the lambdas of a batch, computed once and used at every normalisation site.

`Condition` is for a training forward (statistics of the batch, gradients to the FiLM generators); `Frozen` is for
attack steps and test time (every site folded to one scale and shift per distinct lambda, nothing requires a gradient).

Letters: N images, L distinct lambdas, C channels, S segments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Lambdas of a batch. Statistics segments are (clean, lambda = 0 | clean, lambda > 0 | adversarial), or more."""

    row_N: Tensor
    """Row of each image among the distinct lambdas, int64."""
    segment_N: Tensor
    """Whose batch statistics an image belongs to, int32."""
    group_of_segment: tuple[int, ...]
    """Norm group of each segment: (0, 1, 1) with dual norm; (0, 0) with single norm (clean | adversarial); (0,), all
    images in one segment, with shared statistics."""
    group_L: Tensor
    """Norm group of each distinct lambda, int64; of its scale and shift alone with shared statistics."""
    num_zero: int
    """Images with lambda = 0."""
    zeros_first: bool
    """Whether those come before all others, as a joint forward needs."""
    films: tuple[tuple[Tensor, Tensor] | None, ...]
    """(scale_LC, shift_LC) of each site, None at a site without FiLM."""
    sync: bool = False
    """Share batch statistics over all ranks."""
    width: float = 1.0
    """Share of the channels of every layer that take part."""
    noise: tuple[Tensor, ...] | None = None
    """lambda * N(0, 1) for the weights of each layer of a network with weight noise, else None. It is for the images
    with lambda > 0, which all have one lambda; those with lambda = 0 need a forward of their own (`split`)."""

    def joint(self, clean_M: Tensor | None = None, views: Sequence[str] = ("own",)) -> "Condition":
        """The condition of cat(clean images, adversarial partners of those with lambda > 0, further views of them).

        Args:
            clean_M: [M] int64 positions of the clean images that take part, increasing; None: all.
            views: Batch statistics of each image that those with lambda > 0 have beside the clean one: `own`, a segment
                for this view, or `clean`, that of the clean image; with shared statistics no view has its own.
        """
        if not self.zeros_first:
            raise ValueError("lam: images with lambda = 0 must come first in a batch that gets adversarial partners")
        partner_row, partner_segment = self.row_N[self.num_zero :], self.segment_N[self.num_zero :]
        row, segment, groups = self.row_N, self.segment_N, self.group_of_segment
        if clean_M is not None:
            row, segment = row.index_select(0, clean_M), segment.index_select(0, clean_M)
        segments = [segment]
        own = len(groups) - 1
        for view in views:
            is_own = view == "own" and len(groups) > 1  # shared statistics are of all images
            segments.append(torch.full_like(partner_segment, own) if is_own else partner_segment)
            own += is_own
        return replace(
            self,
            row_N=torch.cat((row, *[partner_row] * len(views))),
            segment_N=torch.cat(segments),
            group_of_segment=groups + groups[-1:] * (own - len(groups)),
        )

    def attacked(self) -> "Condition":
        """The condition of the images that do not come first with lambda = 0."""
        return self.split()[1]

    def split(self) -> tuple["Condition", "Condition"]:
        """The conditions of the images with lambda = 0, which come first and have no weight noise, and of the others.

        Raises:
            ValueError: They do not come first.
        """
        if not self.zeros_first:
            raise ValueError("lam: images with lambda = 0 must come first in a batch that is split there")
        zero, other = slice(self.num_zero), slice(self.num_zero, None)
        return (
            replace(self, row_N=self.row_N[zero], segment_N=self.segment_N[zero], noise=None),
            replace(self, row_N=self.row_N[other], segment_N=self.segment_N[other], num_zero=0),
        )


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A network as constants: one affine per site and distinct lambda, and detached weights."""

    row_N: Tensor
    """Row of each image among the distinct lambdas, int64."""
    affines: tuple[tuple[Tensor, Tensor], ...]
    """(scale_LC, shift_LC) of each site."""
    weights: Mapping[str, Tensor]
    """Detached parameters outside the normalisation sites, by name; those of a width sliced, those with noise noisy."""
    width: float = 1.0
    """Share of the channels of every layer that take part."""
    noise: ClassVar[None] = None

    def tensors(self) -> list[Tensor]:
        """Everything in a fixed order."""
        return [self.row_N, *(half for pair in self.affines for half in pair), *self.weights.values()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Frozen":
        """The same network made of other tensors, in the order of `tensors`."""
        row_N, *rest = tensors
        num_halves = 2 * len(self.affines)
        return replace(
            self,
            row_N=row_N,
            affines=tuple(zip(rest[:num_halves:2], rest[1:num_halves:2], strict=True)),
            weights=dict(zip(self.weights, rest[num_halves:], strict=True)),
        )

    def for_rows(self, row_N: Tensor) -> "Frozen":
        """The same network for other images, given the row of each among the distinct lambdas."""
        return replace(self, row_N=row_N)

    def for_row(self, row: int, num_images: int) -> "Frozen":
        """The same network with one distinct lambda for all of `num_images` images."""
        return self.for_rows(self.row_N.new_full((num_images,), row))


@dataclass(frozen=True, kw_only=True)
class FrozenDraws:
    """A network with weight noise as constants, drawn several times: its answer is the mean of theirs."""

    draws: tuple[Frozen, ...]
    """One network per draw of the noise."""

    def tensors(self) -> list[Tensor]:
        """Everything in a fixed order."""
        return [tensor for draw in self.draws for tensor in draw.tensors()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "FrozenDraws":
        """The same networks made of other tensors, in the order of `tensors`."""
        count = len(tensors) // len(self.draws)
        parts = [tensors[at * count : (at + 1) * count] for at in range(len(self.draws))]
        return FrozenDraws(draws=tuple(draw.with_tensors(part) for draw, part in zip(self.draws, parts, strict=True)))

    def for_row(self, row: int, num_images: int) -> "FrozenDraws":
        """The same networks with one distinct lambda for all of `num_images` images."""
        return FrozenDraws(draws=tuple(draw.for_row(row, num_images) for draw in self.draws))
