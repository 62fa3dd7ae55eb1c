"""Confidence intervals of accuracies, by the bootstrap over images."""

import torch
from torch import Tensor

from oat_dist.random import draw_keys, uniform

LEVEL = 0.95
"""Share of intervals that cover the accuracy on endless images."""
RESAMPLES = 1000
"""Samples, as large as the set and drawn from it with replacement."""
_AT_ONCE = 50


def intervals(right_MQ: Tensor, *, seed: int) -> list[tuple[float, float]]:
    """Percentile bootstrap intervals of the mean of every column.

    All columns are resampled together, image by image. Where all images agree the interval is a point.

    Args:
        right_MQ: [M, Q] bool: whether image m is right by quantity q; or numbers, such as the difference between two
            networks on image m, whose interval is then that of the paired difference.
        seed: Seed of the resampling.

    Returns:
        (low, high) of each column, in its unit (Efron, "Bootstrap Methods", Annals of Statistics 1979).
    """
    num_images = len(right_MQ)
    right_MQ = right_MQ.cpu().double()
    means = []
    for batch in torch.arange(RESAMPLES).split(_AT_ONCE):
        drawn = (uniform(draw_keys(seed, "bootstrap", batch), (num_images,)) * num_images).long()
        times = torch.zeros(len(batch), num_images, dtype=torch.float64)
        times.scatter_add_(1, drawn.clamp(max=num_images - 1), torch.ones(drawn.shape, dtype=torch.float64))
        means.append(times @ right_MQ / num_images)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(torch.cat(means), torch.tensor((tail, 1 - tail), dtype=torch.float64), dim=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
