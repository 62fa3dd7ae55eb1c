"""The operator in plain PyTorch tensor operations, without a Python loop over images and without host synchronisation.

Statistics follow Chan, Golub and LeVeque ("Algorithms for Computing the Sample Variance", 1983, equation 2.1): mean and
squared deviation of every image, merged per segment, then (with `sync`) over ranks, always in the same order. The raw
second moment E[x^2] - E[x]^2 is never formed. Everything is differentiable by autograd, twice.

Letters: N images, C channels, P = H*W pixels, G norm groups, S segments, L distinct lambdas, R ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.collectives import all_gather


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are computed in: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of_groups(per_group_GC: Tensor, group_of_segment: Sequence[int]) -> Tensor:
    """[S, C] rows of a per-group tensor; Python indices, so that nothing is copied to the device."""
    return torch.stack([per_group_GC[g] for g in group_of_segment])


def segment_statistics(
    x_NCHW: Tensor, segment_N: Tensor, num_segments: int, *, sync: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values, mean and biased variance per segment and channel.

    Args:
        x_NCHW: Images in the accumulator dtype.
        segment_N: Segment of each image.
        num_segments: S; segments without images get count 0, mean 0, variance 0.
        sync: Merge the statistics of all ranks (one collective forward, one backward); every rank must call.

    Returns:
        count_S, mean_SC, var_SC.
    """
    num_pixels = x_NCHW.shape[2] * x_NCHW.shape[3]
    var_NC, mean_NC = torch.var_mean(x_NCHW, (2, 3), correction=0)
    member_SN = (segment_N[None] == torch.arange(num_segments, device=segment_N.device)[:, None]).to(x_NCHW.dtype)
    images_S = member_SN.sum(1)
    mean_SC = (member_SN @ mean_NC) / images_S.clamp(min=1)[:, None]
    between_NC = (mean_NC - mean_SC.index_select(0, segment_N)).square()
    m2_SC = num_pixels * (member_SN @ (var_NC + between_NC))
    count_S = images_S * num_pixels
    if sync:
        count_S, mean_SC, m2_SC = _merge_ranks(count_S, mean_SC, m2_SC)
    return count_S, mean_SC, m2_SC / count_S.clamp(min=1)[:, None]


def _merge_ranks(count_S: Tensor, mean_SC: Tensor, m2_SC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chan's merge of every rank's (n, mean, M2), in rank order, from one gathered tensor."""
    packed_SX = torch.cat((count_S[:, None], mean_SC, m2_SC), 1)
    gathered_RSX = all_gather(packed_SX)
    channels = mean_SC.shape[1]
    count_RS1, mean_RSC, m2_RSC = gathered_RSX.split((1, channels, channels), 2)
    total_S1 = count_RS1.sum(0)
    mean_SC = (count_RS1 * mean_RSC).sum(0) / total_S1.clamp(min=1)
    m2_SC = (m2_RSC + count_RS1 * (mean_RSC - mean_SC).square()).sum(0)
    return total_S1[:, 0].detach(), mean_SC, m2_SC


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_SC: Tensor,
    var_SC: Tensor,
    *,
    segment: Tensor,
    group_of_segment: Sequence[int],
    film_scale: Tensor | None,
    film_shift: Tensor | None,
    film_row: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
) -> Tensor:
    """Normalise with given statistics, modulate, add, activate: the apply pass of `film_dual_bn`.

    The affine is kept in centred form, a * (x - mean) + b, so that a large mean does not cancel.
    """
    acc = accumulator(x.dtype)
    a_SC = rows_of_groups(weight, group_of_segment).to(acc) * torch.rsqrt(var_SC + eps)
    b_SC = rows_of_groups(bias, group_of_segment).to(acc)
    a_NC, b_NC = a_SC.index_select(0, segment), b_SC.index_select(0, segment)
    if film_scale is not None:
        scale_NC = film_scale.to(acc).index_select(0, film_row)
        a_NC, b_NC = scale_NC * a_NC, scale_NC * b_NC + film_shift.to(acc).index_select(0, film_row)
    centred = x.to(acc) - mean_SC.index_select(0, segment)[:, :, None, None]
    y = torch.addcmul(b_NC[:, :, None, None], a_NC[:, :, None, None], centred)
    return _finish(y, residual, relu, x.dtype)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, row: Tensor, *, residual: Tensor | None, relu: bool) -> Tensor:
    """Y = act(scale[row] * x + shift[row] + residual): the frozen form."""
    acc = accumulator(x.dtype)
    scale_N = scale.to(acc).index_select(0, row)[:, :, None, None]
    shift_N = shift.to(acc).index_select(0, row)[:, :, None, None]
    return _finish(torch.addcmul(shift_N, scale_N, x.to(acc)), residual, relu, x.dtype)


def _finish(y: Tensor, residual: Tensor | None, relu: bool, dtype: torch.dtype) -> Tensor:
    if residual is not None:
        y = y + residual
    return (torch.relu(y) if relu else y).to(dtype)


@torch.no_grad()
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    count_S: Tensor,
    mean_SC: Tensor,
    var_SC: Tensor,
    group_of_segment: Sequence[int],
    momentum: float,
) -> None:
    """Move the running statistics of each group, segment after segment, in place and without a host synchronisation.

    An empty segment moves nothing; a segment of one value moves only the mean (it has no unbiased variance).
    """
    # Cast before the product: momentum times a boolean would be rounded to float32.
    mean_weight_S = momentum * (count_S > 0).to(count_S.dtype)
    var_weight_S = momentum * (count_S > 1).to(count_S.dtype)
    unbiased_SC = var_SC * (count_S / (count_S - 1).clamp(min=1))[:, None]
    for s, g in enumerate(group_of_segment):
        running_mean[g] += mean_weight_S[s] * (mean_SC[s] - running_mean[g])
        running_var[g] += var_weight_S[s] * (unbiased_SC[s] - running_var[g])
