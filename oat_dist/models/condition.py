"""What a network is told about the lambdas of a batch, computed once and used at every normalisation site.

`Condition` is for a training forward (statistics of the batch, gradients to the FiLM generators); `Frozen` is for
attack steps and test time (every site folded to one scale and shift per distinct lambda, nothing requires a gradient).

Letters: N images, L distinct lambdas, C channels, S segments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    """Norm group of each segment: (0, 1, 1) with dual norm; (0, 0) with single norm (clean | adversarial)."""
    group_L: Tensor
    """Norm group of each distinct lambda, int64."""
    num_zero: int
    """Images with lambda = 0."""
    zeros_first: bool
    """Whether those come before all others, as a joint forward needs."""
    films: tuple[tuple[Tensor, Tensor] | None, ...]
    """(scale_LC, shift_LC) of each site, None at a site without FiLM."""
    sync: bool = False
    """Share batch statistics over all ranks."""

    def joint(self, clean_M: Tensor | None = None, views: Sequence[str] = ("own",)) -> "Condition":
        """The condition of cat(clean images, adversarial partners of those with lambda > 0, further views of them).

        Args:
            clean_M: [M] int64 positions of the clean images that take part, increasing; None: all.
            views: Batch statistics of each image that those with lambda > 0 have beside the clean one: `own`, a segment
                for this view, or `clean`, that of the clean image.
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
            segments.append(partner_segment if view == "clean" else torch.full_like(partner_segment, own))
            own += view == "own"
        return replace(
            self,
            row_N=torch.cat((row, *[partner_row] * len(views))),
            segment_N=torch.cat(segments),
            group_of_segment=groups + groups[-1:] * (own - len(groups)),
        )


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A network as constants: one affine per site and distinct lambda, and detached weights."""

    row_N: Tensor
    """Row of each image among the distinct lambdas, int64."""
    affines: tuple[tuple[Tensor, Tensor], ...]
    """(scale_LC, shift_LC) of each site."""
    weights: Mapping[str, Tensor]
    """Detached parameters outside the normalisation sites, by name."""

    def images(self, selection: slice) -> "Frozen":
        """The same network for some of the images."""
        return replace(self, row_N=self.row_N[selection])

    def tensors(self) -> list[Tensor]:
        """Everything in a fixed order."""
        return [self.row_N, *(half for pair in self.affines for half in pair), *self.weights.values()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Frozen":
        """The same network made of other tensors, in the order of `tensors`."""
        row_N, *rest = tensors
        num_halves = 2 * len(self.affines)
        return Frozen(
            row_N=row_N,
            affines=tuple(zip(rest[:num_halves:2], rest[1:num_halves:2], strict=True)),
            weights=dict(zip(self.weights, rest[num_halves:], strict=True)),
        )

    def for_rows(self, row_N: Tensor) -> "Frozen":
        """The same network for other images, given the row of each among the distinct lambdas."""
        return replace(self, row_N=row_N)
