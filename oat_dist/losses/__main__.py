"""The table of objectives: `python -m oat_dist.losses` prints it, `python -m oat_dist.losses FILE` renews it in a file.

In a file it stands between two lines that are markers.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from oat_dist.losses import METHODS, Objective

BEGIN, END = "<!-- python -m oat_dist.losses -->", "<!-- end -->"


class Passes(NamedTuple):
    """What an image with lambda = 1 costs, its clean image included only where the objective needs it."""

    forward: int
    """Forward passes."""
    backward: int
    """Backward passes, those of the attack and those that are differentiated included."""
    second: int
    """Backward passes through a backward pass."""


def passes(objective: Objective) -> Passes:
    """Passes of an objective with its paper's attack."""
    steps, (forward, backward) = objective.attack.steps, objective.attack.preparation
    images = objective.views + bool(objective.needs & {"clean_logits", "input_gradient"})
    second = images if objective.has_input_gradient else 0
    return Passes(forward + steps + images, backward + steps + images + second, second)


def table() -> str:
    """All objectives of the package as a Markdown table."""
    names = ("`loss.robust`", "source", "settings", "attack", "needs", "forward", "backward", "second backward")
    found = (value for method in METHODS for value in vars(method).values() if isinstance(value, Objective))
    rows = [names, ("---",) * len(names), *map(_row, {objective.name: objective for objective in found}.values())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def renewed(text: str) -> str:
    """A text with the table between its markers.

    Raises:
        ValueError: The markers are not there.
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected a line {BEGIN} and after it a line {END}")
    return f"{before}{begin}\n{table()}\n{end}{after}"


def _row(objective: Objective) -> tuple[str, ...]:
    settings = [
        f"{name} {value:g}" + (" (lambda may drive it)" if name in objective.conditionable else "")
        for name, value in objective.settings.items()
    ]
    needs = sorted(need.replace("_", " ") for need in objective.needs)
    return (
        f"`{objective.name}`",
        objective.source,
        ", ".join(settings) or "none",
        _attack(objective),
        ", ".join(needs) or "none",
        *map(str, passes(objective)),
    )


def _attack(objective: Objective) -> str:
    attack = objective.attack
    size = "min(1.25 eps, eps + 4/255) / steps" if attack.step_share is None else _eps(attack.step_share)
    starts = {
        "uniform": f"uniform in {_eps(attack.start_size)}",
        "gaussian": f"Gaussian, deviation {attack.start_size:g}",
        "none": "the image",
    }
    steps = f"{attack.steps} step{'s' * (attack.steps != 1)} of {size}, start: {starts[attack.start]}"
    return steps + ("" if attack.project else "; not brought back into the ball")


def _eps(share: float) -> str:
    return "eps" if share == 1 else f"{share:g} eps"


def main(argv: Sequence[str]) -> None:
    """Print the table, or renew it in files."""
    if not argv:
        print(table(), end="")
    for name in argv:
        path = pathlib.Path(name)
        path.write_text(renewed(path.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
