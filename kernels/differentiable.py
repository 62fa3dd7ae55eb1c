"""The backward of the operators as differentiable tensor operations, for gradients of gradients.

The fast backward passes are not differentiable. Under `create_graph` (local linearity, gradient alignment, Hessian
products) the operators hand over to this file: slower, the same values, differentiable any number of times. The second
derivative of ReLU is 0 almost everywhere, so its mask is a constant here.

Letters: N images, C channels, P = H*W pixels, G norm groups, S segments, L distinct lambdas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.collectives import merge_ranks
from kernels.torch_backend import accumulator, rows_of_groups


def site_grads(
    dy: Tensor,
    y: Tensor | None,
    inputs: Sequence[Tensor | None],
    *,
    segment_N: Tensor,
    groups: Sequence[int],
    film_row_N: Tensor | None,
    eps: float,
    sync: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a training site with a graph.

    Args:
        dy: [N, C, H, W] gradient of the output.
        y: Output of a forward with ReLU, else None.
        inputs: x, weight_GC, bias_GC, film_scale_LC, film_shift_LC; the last two may be None.
        segment_N: Segment of each image.
        groups: Norm group of each segment.
        film_row_N: Row of each image in the FiLM tensors, or None.
        eps: That of the forward.
        sync: Whether statistics are those of all ranks.

    Returns:
        dz, which is the gradient of the residual, and one gradient per input that wants one, else None.
    """
    dz = dy if y is None else _through_relu(dy, y)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted:
        return dz, [None] * len(inputs)
    with torch.enable_grad():
        z = _site(*inputs, segment_N=segment_N, groups=groups, film_row_N=film_row_N, eps=eps, sync=sync)
    found = iter(torch.autograd.grad(z, wanted, dz, create_graph=True))
    return dz, [next(found) if t is not None and t.requires_grad else None for t in inputs]


def modulate_grads(
    dy: Tensor, y: Tensor | None, x: Tensor | None, scale_LC: Tensor, row_N: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `modulate` with a graph.

    Args:
        dy: [N, C, H, W] gradient of the output.
        y: Output of a forward with ReLU, else None.
        x: Input, or None when scale and shift want no gradient.
        scale_LC: Scales.
        row_N: Row of each image.

    Returns:
        dz, which is the gradient of the residual, dx, and d_scale_LC and d_shift_LC or None.
    """
    dz = dy if y is None else _through_relu(dy, y)
    dx = dz * scale_LC.to(dz.dtype).index_select(0, row_N)[:, :, None, None]
    if x is None:
        return dz, dx, None, None
    acc = accumulator(x.dtype)
    member_LN = (row_N[None] == torch.arange(len(scale_LC), device=row_N.device)[:, None]).to(acc)
    sums = (member_LN @ (dz.to(acc) * t).sum((2, 3)) for t in (x.to(acc), torch.ones((), dtype=acc, device=x.device)))
    return dz, dx, *(t.to(scale_LC.dtype) for t in sums)


def _through_relu(dy: Tensor, y: Tensor) -> Tensor:
    return torch.where(y.detach() <= 0, 0, dy)


def _site(
    x: Tensor,
    weight_GC: Tensor,
    bias_GC: Tensor,
    film_scale_LC: Tensor | None,
    film_shift_LC: Tensor | None,
    *,
    segment_N: Tensor,
    groups: Sequence[int],
    film_row_N: Tensor | None,
    eps: float,
    sync: bool,
) -> Tensor:
    """FiLM( DualBN(x) ) with batch statistics, in operations that autograd knows."""
    acc = accumulator(x.dtype)
    x_NPC = x.permute(0, 2, 3, 1).flatten(1, 2).to(acc)
    member_SN = (segment_N[None] == torch.arange(len(groups), device=segment_N.device)[:, None]).to(acc)
    images_S1 = member_SN.sum(1, keepdim=True)
    mean_SC = (member_SN @ x_NPC.mean(1)) / images_S1.clamp(min=1)
    m2_SC = member_SN @ (x_NPC - mean_SC.index_select(0, segment_N)[:, None]).square().sum(1)
    count_S = images_S1[:, 0] * x_NPC.shape[1]
    if sync:
        count_S, mean_SC, m2_SC = merge_ranks(count_S, mean_SC, m2_SC)
    var_SC = m2_SC / count_S.clamp(min=1)[:, None]
    a_NC = (rows_of_groups(weight_GC, groups).to(acc) * torch.rsqrt(var_SC + eps)).index_select(0, segment_N)
    b_NC = rows_of_groups(bias_GC, groups).to(acc).index_select(0, segment_N)
    if film_scale_LC is not None:
        scale_NC = film_scale_LC.to(acc).index_select(0, film_row_N)
        a_NC, b_NC = scale_NC * a_NC, scale_NC * b_NC + film_shift_LC.to(acc).index_select(0, film_row_N)
    z_NPC = b_NC[:, None] + a_NC[:, None] * (x_NPC - mean_SC.index_select(0, segment_N)[:, None])
    num, channels, height, width = x.shape
    return z_NPC.view(num, height, width, channels).permute(0, 3, 1, 2).to(x.dtype)
