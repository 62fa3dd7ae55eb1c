"""Sums of what the steps count, and their means over all ranks on log steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from oat_dist.distributed import World

_DENOMINATORS = ("images", "clean", "robust")


class StepLog:
    """Sums counts on the device between two log steps and turns them into means over all ranks."""

    def __init__(self, world: World) -> None:
        """Nothing counted yet.

        Args:
            world: The ranks.
        """
        self.world = world
        self._sums: dict[str, Tensor] = {}
        self._numbers = dict.fromkeys(_DENOMINATORS, 0)

    def add(self, counts: dict[str, Tensor], *, images: int, clean: int, robust: int) -> None:
        """Add a micro-batch; nothing waits for the device.

        Args:
            counts: Name -> sum on the device; names that end in clean or robust are about those images alone.
            images: Images.
            clean: Images that went through the training forward clean.
            robust: Images that were attacked.
        """
        for name, value in counts.items():
            self._sums[name] = self._sums.get(name, 0) + value.double()
        for name, number in zip(_DENOMINATORS, (images, clean, robust), strict=True):
            self._numbers[name] += number

    def flush(self) -> tuple[dict[str, float], int]:
        """Means since the last call, and the number of images; here the host waits."""
        totals = self.collapse()
        numbers = {name: totals.pop(name) for name in _DENOMINATORS}
        values = {}
        for name, total in totals.items():
            number = numbers.get(name.rpartition("_")[2], numbers["images"])
            if number:  # of nothing there is no mean
                values[name.replace("correct", "accuracy")] = total / number
        self._sums, self._numbers = {}, dict.fromkeys(_DENOMINATORS, 0)
        return values, int(numbers["images"])

    def collapse(self) -> dict[str, float]:
        """Sums over ranks since the last flush, which the main rank alone goes on with."""
        numbers = torch.tensor(list(self._numbers.values()), dtype=torch.float64, device=self.world.device)
        totals = self.world.sum(torch.cat((*(s.view(1) for s in self._sums.values()), numbers))).tolist()
        totals = dict(zip([*self._sums, *_DENOMINATORS], totals, strict=True))
        self.restore(totals if self.world.is_main else dict.fromkeys(totals, 0.0))
        return totals

    def restore(self, totals: dict[str, float]) -> None:
        """Go on from sums that `collapse` gave."""
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.world.device)
            for name, value in totals.items()
            if name not in _DENOMINATORS
        }
        self._numbers = {name: int(totals[name]) for name in _DENOMINATORS}


class WidthLogs:
    """A `StepLog` for each width of a network; values of narrower ones are called `width_0.5/loss`."""

    def __init__(self, widths: Sequence[float], world: World) -> None:
        """Nothing counted yet.

        Args:
            widths: Of the network, 1 among them.
            world: The ranks.
        """
        self._logs = {width: StepLog(world) for width in sorted(widths, reverse=True)}

    def add(self, width: float, counts: dict[str, Tensor], *, images: int, clean: int, robust: int) -> None:
        """Add a micro-batch at a width; see `StepLog.add`."""
        self._logs[width].add(counts, images=images, clean=clean, robust=robust)

    def flush(self) -> tuple[dict[str, float], int]:
        """Means since the last call, and the number of images of the whole network; here the host waits."""
        values, images = self._logs[1.0].flush()
        for prefix, log in self._narrow().items():
            values |= {f"{prefix}/{name}": value for name, value in log.flush()[0].items()}
        return values, images

    def collapse(self) -> dict[str, float]:
        """Sums over ranks since the last flush, which the main rank alone goes on with."""
        totals = self._logs[1.0].collapse()
        for prefix, log in self._narrow().items():
            totals |= {f"{prefix}/{name}": total for name, total in log.collapse().items()}
        return totals

    def restore(self, totals: dict[str, float]) -> None:
        """Go on from sums that `collapse` gave."""
        self._logs[1.0].restore({name: total for name, total in totals.items() if "/" not in name})
        for prefix, log in self._narrow().items():
            start = f"{prefix}/"
            log.restore({name.removeprefix(start): v for name, v in totals.items() if name.startswith(start)})

    def _narrow(self) -> dict[str, StepLog]:
        return {f"width_{width:g}": log for width, log in self._logs.items() if width < 1}
