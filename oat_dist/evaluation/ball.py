"""The ball that adversarial images must lie in, checked on every image that is said to be broken."""

import torch
from torch import Tensor

_RELATIVE, _ABSOLUTE = 1e-4, 1e-6
"""Slack for rounding: thousands of float32 pixels are summed in the L1 and L2 norms."""


class Ball:
    """A norm ball within the pixel range.

    Attributes:
        outside: Points so far that were wrong but lay outside; not-a-number lies outside.
    """

    def __init__(self, norm: str, eps: float) -> None:
        """Start at none.

        Args:
            norm: `linf`, `l2` or `l1`.
            eps: Radius, pixel units of [0, 1].
        """
        self.norm, self.eps = norm, eps
        self.outside = 0

    def keep_inside(self, wrong: Tensor, x: Tensor, x_adv: Tensor) -> Tensor:
        """Which wrong answers count.

        Args:
            wrong: [N] bool: where a network answers wrongly.
            x: [N, C, H, W] images, the centres of the balls.
            x_adv: [N, C, H, W] points.

        Returns:
            [N] bool: wrong, and the point lies in the ball and in [0, 1].
        """
        at = wrong.nonzero().flatten()
        if len(at) == 0:
            return wrong
        moved = x_adv[at].flatten(1)
        size = {"linf": torch.inf, "l2": 2, "l1": 1}[self.norm]
        length = torch.linalg.vector_norm(moved - x[at].flatten(1), size, dim=1)
        low, high = moved.aminmax(dim=1)
        in_ball = length <= self.eps * (1 + _RELATIVE) + _ABSOLUTE
        inside = in_ball & (low >= -_ABSOLUTE) & (high <= 1 + _ABSOLUTE)
        self.outside += len(at) - int(inside.sum())
        return wrong.index_put((at,), inside)
