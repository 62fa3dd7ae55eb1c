"""Statistics shared by all ranks: collectives that autograd can differentiate any number of times, and Chan's merge."""

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """Stack a tensor of every rank; the gradient of a rank's part is the sum of all ranks' gradients for it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Gather in rank order."""
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Sum over ranks, own part."""
        return _OwnPartOfSum.apply(grad)


class _OwnPartOfSum(torch.autograd.Function):
    """Sum a stacked tensor over ranks and keep this rank's part: the adjoint of `_AllGather`."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Reduce a copy, take the own part."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Gather."""
        return _AllGather.apply(grad)


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_gather(x: Tensor) -> Tensor:
    """Stack `x` of every rank along a new first dimension; one rank alone needs no process group.

    Args:
        x: Any shape, the same on every rank. Every rank must call, in forward and in backward.

    Returns:
        [R, *x.shape], in rank order.
    """
    return _AllGather.apply(x) if _has_ranks() else x[None]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over ranks, a new tensor; not differentiable. Every rank must call."""
    x = x.clone()
    if _has_ranks():
        dist.all_reduce(x)
    return x


def merge_ranks(count_S: Tensor, mean_SC: Tensor, m2_SC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, mean, M2) of all ranks together, from one gathered tensor, merged in rank order.

    Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983), equation 2.1. Every rank must call,
    also with empty segments.

    Args:
        count_S: Number of values per segment.
        mean_SC: Means.
        m2_SC: Sums of squared deviations.

    Returns:
        The same three over all ranks.
    """
    channels = mean_SC.shape[1]
    gathered_RSX = all_gather(torch.cat((count_S[:, None], mean_SC, m2_SC), 1))
    count_RS1, mean_RSC, m2_RSC = gathered_RSX.split((1, channels, channels), 2)
    total_S1 = count_RS1.sum(0)
    mean_SC = (count_RS1 * mean_RSC).sum(0) / total_S1.clamp(min=1)
    m2_SC = (m2_RSC + count_RS1 * (mean_RSC - mean_SC).square()).sum(0)
    return total_S1[:, 0].detach(), mean_SC, m2_SC
