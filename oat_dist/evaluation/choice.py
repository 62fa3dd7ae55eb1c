"""The lambda for a wanted accuracy, chosen from points of the validation split."""

from collections.abc import Sequence

from oat_dist.errors import UserError

GRID = tuple(at / 20 for at in range(21))
"""Lambdas to choose from where none are named."""


def meeting(points: Sequence[dict], key: str, target: float) -> list[dict]:
    """The points whose accuracy reaches a target.

    Args:
        points: {"lam", `key`} each.
        key: `sa` or `ra`.
        target: Fraction in [0, 1].

    Raises:
        UserError: None does.
    """
    enough = [point for point in points if point[key] >= target]
    if not enough:
        best = max(points, key=lambda point: point[key])
        raise UserError(
            f"--target-{key}={target:g}: not reached on the validation split; the highest {key.upper()} is "
            f"{best[key]:.3f}, at lambda {best['lam']:g}"
        )
    return enough


def choose(points: Sequence[dict], key: str, target: float) -> dict:
    """Of the points that reach a target, the one that is best otherwise.

    Args:
        points: {"lam", "sa", "ra"} each.
        key: `sa` or `ra`.
        target: Fraction in [0, 1].

    Returns:
        The point with the highest accuracy of the other kind; of equals, the one furthest above the target.

    Raises:
        UserError: No point reaches the target.
    """
    other = {"sa": "ra", "ra": "sa"}[key]
    return max(meeting(points, key, target), key=lambda point: (point[other], point[key], -point["lam"]))
