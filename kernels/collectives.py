"""Collectives that autograd can differentiate, for statistics shared by all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AllGather(torch.autograd.Function):
    """Stack a tensor of every rank; the gradient of a rank's part is the sum of all ranks' gradients for it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Gather in rank order."""
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.stack(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        """Sum over ranks, own part."""
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def all_gather(x: Tensor) -> Tensor:
    """Stack `x` of every rank along a new first dimension; one rank alone needs no process group.

    Args:
        x: Any shape, the same on every rank. Every rank must call, in forward and in backward.

    Returns:
        [R, *x.shape], in rank order.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x[None]
    return _AllGather.apply(x)
