"""How good a set of (SA, RA) points is, and how close one conditional network comes to dedicated ones.

Both axes are scaled so that a frame maps to [0, 1], and the score is the hypervolume (Zitzler and Thiele, 1999)
dominated by the points above the reference point (-0.1, -0.1). From (0, 0) of the unscaled axes one single point would
already have nearly all of it, so a score would say nothing. The frame comes from the dedicated networks of the two
ends: an unconditioned network each for lambda = 0 and lambda = 1. The frontier ratio is the score of a conditional
network over the score of the dedicated networks at the same lambdas.

A point is {"lam", "sa", "ra"}, with "width" where a network has several and, where they are known, the confidence
intervals "sa_ci" and "ra_ci" over images; accuracies are fractions in [0, 1]. A mean point, of several seeds, has
"sa_std", "ra_std" and "seeds" too. Nothing here trains or reads anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import moocore
import numpy as np

from oat_dist.errors import UserError

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


def dedicated_frame(dedicated: Sequence[dict]) -> Frame:
    """The frame that dedicated networks define.

    Args:
        dedicated: Their points (means over seeds), those of lambda = 0 and lambda = 1 among them.

    Raises:
        UserError: An end is missing, or the ends show no trade-off, so that a ratio would be noise or undefined.
    """
    ends = {point["lam"]: point for point in dedicated if point["lam"] in (0.0, 1.0)}
    if len(ends) < 2:
        raise UserError(f"frontier: the frame needs dedicated networks at lambda 0 and 1, got {_lambdas(dedicated)}")
    standard, robust = ends[0.0], ends[1.0]
    for key, high, low in (("sa", standard, robust), ("ra", robust, standard)):
        if not high[key] > low[key]:
            raise UserError(
                f"frontier: no trade-off in {key.upper()}: the dedicated networks have {100 * standard[key]:.1f}% at "
                f"lambda 0 and {100 * robust[key]:.1f}% at lambda 1; choose attack.eps_255, optim.epochs or data that "
                "show one"
            )
    return Frame(sa_low=robust["sa"], sa_high=standard["sa"], ra_low=standard["ra"], ra_high=robust["ra"])


def frontier_score(points: Sequence[dict], frame: Frame) -> float:
    """Hypervolume of points in the frame.

    Args:
        points: {"sa", "ra"} each, fractions in [0, 1].
        frame: Corners of the frame.

    Returns:
        At least 0; 1.21 for a single point in the corner (1, 1) of the frame, more for points outside it.
    """
    return _hypervolume(_scaled(points, frame))


def frontier_ratio(points: Sequence[dict], dedicated: Sequence[dict]) -> float:
    """Frontier score of points over that of dedicated networks at the same lambdas, in the dedicated frame.

    Args:
        points: Of a conditional network; those at other lambdas are left out.
        dedicated: Points of dedicated networks, means over seeds.

    Returns:
        1 for points as good as the dedicated ones.

    Raises:
        UserError: A lambda of the dedicated networks was not measured, or there is no frame.
    """
    frame = dedicated_frame(dedicated)
    return frontier_score(at_lambdas(points, dedicated), frame) / frontier_score(dedicated, frame)


def at_lambdas(points: Sequence[dict], dedicated: Sequence[dict]) -> list[dict]:
    """The points at the lambdas of the dedicated networks, in their order.

    Raises:
        UserError: One is missing.
    """
    found = {point["lam"]: point for point in points}
    missing = [point["lam"] for point in dedicated if point["lam"] not in found]
    if missing:
        raise UserError(f"frontier: lambda {missing[0]:g} was not measured; the dedicated networks are at "
                        f"{_lambdas(dedicated)}")  # fmt: skip
    return [found[point["lam"]] for point in dedicated]


def of_width(points: Sequence[dict], width: float = 1.0) -> list[dict]:
    """The points of a width, by default of the whole network; those of a network of one width do not name it."""
    return [point for point in points if point.get("width", 1.0) == width]


def pareto_front(points: Sequence[dict]) -> list[dict]:
    """The points that no other beats in SA and RA (one of equals stays), by increasing SA."""
    values = np.array([(point["sa"], point["ra"]) for point in points])
    kept = moocore.is_nondominated(values, maximise=True)
    return sorted((point for point, keep in zip(points, kept, strict=True) if keep), key=lambda point: point["sa"])


def area_between(points: Sequence[dict], others: Sequence[dict], frame: Frame) -> float:
    """Area dominated by exactly one of two sets of points, in the frame; 0 for sets with the same front."""
    one, two = _scaled(points, frame), _scaled(others, frame)
    return 2 * _hypervolume(np.concatenate((one, two))) - _hypervolume(one) - _hypervolume(two)


def monotonicity(points: Sequence[dict]) -> dict[str, float]:
    """How faithfully lambda trades SA for RA: share of steps between neighbouring lambdas that go the right way.

    Args:
        points: At two lambdas or more.

    Returns:
        "sa": share of steps at which SA does not rise; "ra": share at which RA does not fall. 1 is monotone.
    """
    ordered = sorted(points, key=lambda point: point["lam"])
    steps = list(pairwise(ordered))
    return {
        "sa": sum(b["sa"] <= a["sa"] for a, b in steps) / len(steps),
        "ra": sum(b["ra"] >= a["ra"] for a, b in steps) / len(steps),
    }


def mean_points(curves: Sequence[Sequence[dict]]) -> list[dict]:
    """Mean and sample standard deviation over seeds of curves at the same lambdas.

    Args:
        curves: One list of points per seed, in the same order of lambdas.

    Returns:
        Mean points; the deviations are None for one seed. Intervals are the means of the seeds' intervals: as the seeds
        share their images, that is wide enough however they are correlated.
    """
    means = []
    for same in zip(*curves, strict=True):
        assert len({point["lam"] for point in same}) == 1, "curves at different lambdas"
        mean = {"lam": same[0]["lam"]}
        for key in ("sa", "ra"):
            values = np.array([point[key] for point in same])
            mean |= {key: float(values.mean()), f"{key}_std": float(values.std(ddof=1)) if len(same) > 1 else None}
            intervals = [point.get(f"{key}_ci") for point in same]
            if None not in intervals:
                mean[f"{key}_ci"] = np.mean(intervals, axis=0).tolist()
        means.append(mean | {"seeds": len(same)})
    return means


def gaps(points: Sequence[dict], dedicated: Sequence[dict]) -> list[dict]:
    """How far a conditional network stays behind the dedicated one of each lambda.

    Args:
        points: Mean points of a conditional network.
        dedicated: Mean points of the dedicated networks.

    Returns:
        {"lam", "sa_gap", "ra_gap", "sa_gap_se", "ra_gap_se"} per lambda: dedicated minus conditional, so positive means
        behind, and the standard error of that difference over seeds, None where a side has one seed. Where both sides
        have intervals, "sa_gap_ci" and "ra_gap_ci" too, as if the two erred independently: wide, because what is hard
        for one network is hard for the other.
    """
    rows = []
    for ours, theirs in zip(at_lambdas(points, dedicated), dedicated, strict=True):
        row = {"lam": theirs["lam"]}
        for key in ("sa", "ra"):
            row |= {f"{key}_gap": theirs[key] - ours[key], f"{key}_gap_se": _standard_error(ours, theirs, key)}
            if f"{key}_ci" in ours and f"{key}_ci" in theirs:
                row[f"{key}_gap_ci"] = _difference_interval(theirs, ours, key)
        rows.append(row)
    return rows


def controls(dedicated: Sequence[dict]) -> dict[str, list[dict]]:
    """Curves of networks that ignore lambda: a dedicated end's answer at every lambda. Name -> points.

    A measure of a conditional network must put them far below it; they stand in every table.
    """
    ends = {point["lam"]: point for point in dedicated}
    return {
        f"dedicated lambda = {end:g} at every lambda": [
            {"lam": point["lam"], "sa": ends[end]["sa"], "ra": ends[end]["ra"]} for point in dedicated
        ]
        for end in (0.0, 1.0)
    }


def best_constant(dedicated: Sequence[dict]) -> tuple[float, float]:
    """The lambda whose dedicated network alone, at every lambda, has the highest frontier score, and that score.

    What a network that ignores lambda can reach at most: only above it does conditioning show. On a front with a sharp
    knee it is close to the score of the whole front, and the ratio then says little about the trade-off.
    """
    frame = dedicated_frame(dedicated)
    score, lam = max((frontier_score([point], frame), point["lam"]) for point in dedicated)
    return lam, score


def _scaled(points: Sequence[dict], frame: Frame) -> np.ndarray:
    """[points, 2]: SA and RA in units of the frame."""
    low = np.array((frame.sa_low, frame.ra_low))
    high = np.array((frame.sa_high, frame.ra_high))
    return (np.array([(point["sa"], point["ra"]) for point in points]) - low) / (high - low)


def _hypervolume(scaled: np.ndarray) -> float:
    return float(moocore.hypervolume(scaled, ref=REFERENCE, maximise=True))


def _standard_error(ours: dict, theirs: dict, key: str) -> float | None:
    stds = [point.get(f"{key}_std") for point in (ours, theirs)]
    if None in stds:
        return None
    return math.sqrt(sum(std**2 / point["seeds"] for std, point in zip(stds, (ours, theirs), strict=True)))


def _difference_interval(point: dict, other: dict, key: str) -> list[float]:
    """Interval of point - other."""
    (low, high), (other_low, other_high) = point[f"{key}_ci"], other[f"{key}_ci"]
    value, other_value = point[key], other[key]
    below, above = math.hypot(value - low, other_high - other_value), math.hypot(high - value, other_value - other_low)
    return [value - other_value - below, value - other_value + above]


def _lambdas(points: Sequence[dict]) -> str:
    return ", ".join(f"{point['lam']:g}" for point in points)
