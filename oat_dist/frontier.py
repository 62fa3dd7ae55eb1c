"""How good a set of (SA, RA) points is: one number, so that checkpoints and searches can be compared.

Both axes are scaled so that a frame maps to [0, 1], and the score is the hypervolume (Zitzler and Thiele, 1999)
dominated by the points above the reference point (-0.1, -0.1). From (0, 0) of the unscaled axes one single point would
already have nearly all of it, so a score would say nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np

REFERENCE = (-0.1, -0.1)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The corners that scale the axes, as fractions: low maps to 0, high to 1."""

    sa_low: float
    """SA of the most robust network (dedicated lambda = 1)."""
    sa_high: float
    """SA of the standard network (dedicated lambda = 0)."""
    ra_low: float
    """RA of the standard network."""
    ra_high: float
    """RA of the most robust network."""


def loose_frame(num_classes: int) -> Frame:
    """The frame to use where no dedicated networks were trained: from guessing to perfect."""
    return Frame(sa_low=1 / num_classes, sa_high=1.0, ra_low=0.0, ra_high=1.0)


def frontier_score(points: Sequence[dict], frame: Frame) -> float:
    """Hypervolume of points in the frame.

    Args:
        points: {"sa", "ra"} each, fractions in [0, 1].
        frame: Corners of the frame.

    Returns:
        At least 0; 1.21 for a single point in the corner (1, 1) of the frame.
    """
    scaled = np.array(
        [
            (
                (p["sa"] - frame.sa_low) / (frame.sa_high - frame.sa_low),
                (p["ra"] - frame.ra_low) / (frame.ra_high - frame.ra_low),
            )
            for p in points
        ]
    )
    return float(moocore.hypervolume(scaled, ref=REFERENCE, maximise=True))
