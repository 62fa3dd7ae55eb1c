"""Loss and accuracy of training by lambda, summed on the device between two log steps.

Letters: N images, M of them clean in the joint forward, A attacked, B bins of lambda. A bin is one lambda of a discrete
distribution; of a continuous one 0, (0, 0.1], ... (0.9, 1].
"""

import numpy as np
import torch
from torch import Tensor

from oat_dist.config import ConditioningConfig
from oat_dist.distributed import World
from oat_dist.divergence import LAMBDA_BINS, TENTHS_B
from oat_dist.step import StepLosses

_ROWS = ("images", "loss", "clean", "accuracy_clean", "robust", "accuracy_robust")


class LambdaLog:
    """Sums of every bin, and their means over all ranks on log steps."""

    def __init__(self, world: World, cfg: ConditioningConfig) -> None:
        """Nothing counted yet.

        Args:
            world: The ranks.
            cfg: How lambda is drawn.
        """
        self.world = world
        is_discrete = cfg.distribution == "discrete"
        self._edges_B = np.array(cfg.lambdas) if is_discrete else TENTHS_B.numpy()
        self._names = [f"{lam:g}" for lam in cfg.lambdas] if is_discrete else list(LAMBDA_BINS)
        self._sums_RB = self._zeros()

    @torch.no_grad()
    def add(self, losses: StepLosses, lam_N: Tensor) -> None:
        """Add a micro-batch; nothing waits for the device.

        Args:
            losses: Of the micro-batch.
            lam_N: [N] float64 on the host, zeros first.
        """
        lam = lam_N.numpy()  # on the host, like all that is worked out from it
        bin_N = np.searchsorted(self._edges_B, lam)
        bin_M = bin_N if losses.num_clean == len(lam) else bin_N[lam < 1]
        pairs = (
            (bin_N, losses.loss_N),
            (bin_M, losses.correct_clean_M),
            (bin_N[lam > 0], losses.correct_robust_A),
        )
        for at, (bins, value) in enumerate(pairs):
            on_device = torch.from_numpy(bins).to(value.device, non_blocking=True)
            counted = torch.stack((torch.ones_like(value), value)).double()
            self._sums_RB[2 * at : 2 * at + 2].index_add_(1, on_device, counted)

    def flush(self) -> dict[str, float]:
        """Means since the last call, e.g. "loss/0.1"; of bins without images nothing. Here the host waits."""
        sums = dict(zip(_ROWS, self.collapse(), strict=True))
        values = {}
        for name, denominator in (("loss", "images"), ("accuracy_clean", "clean"), ("accuracy_robust", "robust")):
            for bin_name, total, number in zip(self._names, sums[name], sums[denominator], strict=True):
                if number:
                    values[f"{name}/{bin_name}"] = total / number
        self._sums_RB = self._zeros()
        return values

    def collapse(self) -> list[list[float]]:
        """Sums over ranks since the last flush, which the main rank alone goes on with."""
        total_RB = self.world.sum(self._sums_RB)
        self._sums_RB = total_RB if self.world.is_main else self._zeros()
        return total_RB.tolist()

    def restore(self, sums: list[list[float]]) -> None:
        """Go on, on the main rank, from sums that `collapse` gave."""
        self._sums_RB = torch.tensor(sums, dtype=torch.float64, device=self.world.device)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(_ROWS), len(self._names), dtype=torch.float64, device=self.world.device)
