"""Forward passes as Triton kernels: statistics, normalise-and-modulate, modulate, running statistics.

    y = act( a * (x - mean_s) + film_scale * bias_g + film_shift + residual ),   a = film_scale * weight_g * rstd_s

Statistics are sums about a mean of the values themselves, run by run, merged as (n, mean, M2) by the formula of Chan,
Golub and LeVeque ("Algorithms for Computing the Sample Variance", 1983, equation 2.1) in a fixed order without
atomics. E[x^2] - E[x]^2 is never formed.

Images are [N, C, H, W] in channels_last. Nothing here waits for the device or copies to it. `plan` overrides the tile
shape (`kernels.tiling`), for tests. Letters: N images, C channels, P = H*W pixels, G norm groups, S segments, L
distinct lambdas, R partial rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiling import (
    Plan,
    accumulator,
    dense,
    elementwise_plan,
    group_of,
    image_tile,
    load_row,
    pack_groups,
    reciprocal_std,
    shape_of,
    statistics_plan,
    torch_accumulator,
)


@triton.jit
def _merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Chan's merge, element by element; two empty parts give 0, 0, 0."""
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    delta = mean_b - mean_a
    return n, mean_a + delta * share, m2_a + m2_b + delta * (delta * (n_a * share))


@triton.jit
def _into_segment(segment, n, mean, s1_LC, s2_LC, n_S1, mean_SC, m2_SC, S_PAD: tl.constexpr):
    """Merge a run of tiles into its segment: `n` values whose deviations from `mean` have sums and squares s1, s2."""
    s1 = tl.sum(s1_LC, 0)
    rest = s1 / tl.maximum(n, 1.0)
    m2 = tl.sum(s2_LC, 0) - s1 * rest
    m2 = tl.where(m2 < 0, 0.0, m2)
    new_n, new_mean, new_m2 = _merge(n_S1, mean_SC, m2_SC, n, (mean + rest)[None, :], m2[None, :])
    here = (tl.arange(0, S_PAD) == segment)[:, None]
    return tl.where(here, new_n, n_S1), tl.where(here, new_mean, mean_SC), tl.where(here, new_m2, m2_SC)


@triton.jit
def _stats_kernel(
    x_ptr, segment_ptr, count_RS_ptr, mean_RSC_ptr, m2_RSC_ptr, T, P, C, R, S: tl.constexpr, S_PAD: tl.constexpr,
    ACC: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One of R stretches of consecutive tiles (T in all) to one partial row per segment.

    A run of tiles of one segment is summed as deviations, and their squares, from the mean of its first tile. That
    mean is at most sqrt(tiles in the run) standard deviations off, so that what is subtracted in the end,
    s2 - s1^2 / n, loses a few bits at worst, and nothing is divided or exchanged between threads inside a run.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    r = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = tl.cdiv(P, FOLD * LANES)
    row = (tl.arange(0, FOLD) * LANES)[:, None, None] + tl.arange(0, LANES)[None, :, None]
    offset = row * C + c[None, None, :]
    n_S1 = tl.zeros((S_PAD, 1), ACC)
    mean_SC = tl.zeros((S_PAD, BLOCK_C), ACC)
    m2_SC = tl.zeros((S_PAD, BLOCK_C), ACC)
    n = tl.zeros((), ACC)
    mean = tl.zeros((BLOCK_C,), ACC)
    s1_LC = tl.zeros((LANES, BLOCK_C), ACC)
    s2_LC = tl.zeros((LANES, BLOCK_C), ACC)
    current = -1
    begin = (r.to(tl.int64) * T // R).to(tl.int32)
    end = ((r.to(tl.int64) + 1) * T // R).to(tl.int32)
    for t in tl.range(begin, end, num_stages=STAGES):
        image = t // tiles
        first = t % tiles * (FOLD * LANES)
        valid = first + row < P
        size = tl.minimum(P - first, FOLD * LANES).to(ACC)
        start = (image.to(tl.int64) * P + first) * C
        x = tl.load(x_ptr + start + offset, mask=valid & (c < C)[None, None, :], other=0.0).to(ACC)
        segment = tl.load(segment_ptr + image).to(tl.int32)
        if segment != current:
            n_S1, mean_SC, m2_SC = _into_segment(current, n, mean, s1_LC, s2_LC, n_S1, mean_SC, m2_SC, S_PAD)
            n = tl.zeros((), ACC)
            mean = tl.sum(tl.sum(x, 0), 0) / size
            s1_LC = tl.zeros((LANES, BLOCK_C), ACC)
            s2_LC = tl.zeros((LANES, BLOCK_C), ACC)
            current = segment
        deviation = tl.where(valid, x - mean[None, None, :], 0.0)
        n += size
        s1_LC += tl.sum(deviation, 0)
        s2_LC += tl.sum(deviation * deviation, 0)
    n_S1, mean_SC, m2_SC = _into_segment(current, n, mean, s1_LC, s2_LC, n_S1, mean_SC, m2_SC, S_PAD)
    s = tl.arange(0, S_PAD)[:, None]
    to = (r * S + s) * C + c[None, :]
    mask = (s < S) & (c < C)[None, :]
    tl.store(mean_RSC_ptr + to, mean_SC, mask=mask)
    tl.store(m2_RSC_ptr + to, m2_SC, mask=mask)
    # Every block of channels counts the same, so that all may store.
    tl.store(count_RS_ptr + r * S + s, n_S1, mask=s < S)


@triton.jit
def _merge_stats_kernel(
    count_RS_ptr, mean_RSC_ptr, m2_RSC_ptr, count_S_ptr, mean_SC_ptr, m2_SC_ptr, C, R, S: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All partial rows of one segment at once."""
    blocks = tl.cdiv(C, BLOCK_C)
    s = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)[:, None]
    at = (r * S + s) * C + c[None, :]
    mask = (r < R) & (c < C)[None, :]
    n_R1 = tl.load(count_RS_ptr + r * S + s, mask=r < R, other=0.0)
    mean_RC = tl.load(mean_RSC_ptr + at, mask=mask, other=0.0)
    m2_RC = tl.load(m2_RSC_ptr + at, mask=mask, other=0.0)
    total = tl.sum(tl.sum(n_R1, 1), 0)
    # Relative to one of the means: rounding is then that of their differences, not of a mean far from zero.
    pivot = tl.where(total > 0, tl.max(tl.where(n_R1 > 0, mean_RC, -float("inf")), 0), 0.0)
    relative_RC = tl.where(n_R1 > 0, mean_RC - pivot[None, :], 0.0)
    relative = tl.sum(n_R1 * relative_RC, 0) / tl.maximum(total, 1.0)
    between_RC = relative_RC - relative[None, :]
    m2 = tl.sum(m2_RC + n_R1 * between_RC * between_RC, 0)
    mean = pivot + relative
    tl.store(mean_SC_ptr + s * C + c, mean, mask=c < C)
    tl.store(m2_SC_ptr + s * C + c, m2, mask=c < C)
    tl.store(count_S_ptr + s, total)


@triton.jit
def _activate(z, RELU: tl.constexpr):
    """ReLU or identity; NaN stays NaN."""
    if RELU:
        z = tl.where(z <= 0, 0.0, z)
    return z


@triton.jit
def _apply_kernel(
    x_ptr, residual_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, film_scale_ptr, film_shift_ptr, segment_ptr,
    film_row_ptr, P, C, groups, EPS: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of y. Absent FiLM and residual are None."""
    n, c, start, offset, mask = image_tile(P, C, ROWS, BLOCK_C)
    x = tl.load(x_ptr + start + offset, mask=mask, other=0.0).to(ACC)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + start + offset, mask=mask, other=0.0).to(ACC)
    s = tl.load(segment_ptr + n).to(tl.int32)
    g = group_of(groups, s)
    a = load_row(weight_ptr, g, C, c, ACC) * reciprocal_std(load_row(var_ptr, s, C, c, ACC), EPS)
    b = load_row(bias_ptr, g, C, c, ACC)
    if film_row_ptr is not None:
        row = tl.load(film_row_ptr + n).to(tl.int32)
        scale = load_row(film_scale_ptr, row, C, c, ACC)
        a = scale * a
        b = scale * b + load_row(film_shift_ptr, row, C, c, ACC)
    z = a[None, :] * (x - load_row(mean_ptr, s, C, c, ACC)[None, :]) + b[None, :]
    if residual_ptr is not None:
        z += residual
    tl.store(y_ptr + start + offset, _activate(z, RELU).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _modulate_kernel(
    x_ptr, residual_ptr, y_ptr, scale_ptr, shift_ptr, row_ptr, P, C, RELU: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of y. An absent residual is None."""
    n, c, start, offset, mask = image_tile(P, C, ROWS, BLOCK_C)
    x = tl.load(x_ptr + start + offset, mask=mask, other=0.0).to(ACC)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + start + offset, mask=mask, other=0.0).to(ACC)
    row = tl.load(row_ptr + n).to(tl.int32)
    z = load_row(scale_ptr, row, C, c, ACC)[None, :] * x + load_row(shift_ptr, row, C, c, ACC)[None, :]
    if residual_ptr is not None:
        z += residual
    tl.store(y_ptr + start + offset, _activate(z, RELU).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _update_running_kernel(
    running_mean_ptr, running_var_ptr, count_ptr, mean_ptr, var_ptr, C, groups, MOMENTUM: tl.constexpr,
    S: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every segment in its turn moves the statistics of its group; one program per group and block of channels."""
    blocks = tl.cdiv(C, BLOCK_C)
    g = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = load_row(running_mean_ptr, g, C, c, ACC)
    var = load_row(running_var_ptr, g, C, c, ACC)
    for s in tl.static_range(S):
        count = tl.load(count_ptr + s).to(ACC)
        mine = group_of(groups, s) == g
        moved_mean = mean + MOMENTUM * (load_row(mean_ptr, s, C, c, ACC) - mean)
        unbiased = load_row(var_ptr, s, C, c, ACC) * (count / tl.maximum(count - 1.0, 1.0))
        mean = tl.where(mine & (count > 0), moved_mean, mean)
        var = tl.where(mine & (count > 1), var + MOMENTUM * (unbiased - var), var)
    tl.store(running_mean_ptr + g * C + c, mean.to(running_mean_ptr.dtype.element_ty), mask=c < C)
    tl.store(running_var_ptr + g * C + c, var.to(running_var_ptr.dtype.element_ty), mask=c < C)


def segment_statistics(
    x: Tensor, segment_N: Tensor, num_segments: int, *, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values, mean and sum of squared deviations per segment and channel.

    Args:
        x: [N, C, H, W] in channels_last.
        segment_N: Segment of each image, in any order.
        num_segments: S; a segment without images gets 0, 0, 0.
        plan: Tile shape, else `statistics_plan`.

    Returns:
        count_S, mean_SC, m2_SC in the accumulator dtype.
    """
    num, pixels, channels = shape_of(x)
    acc, (segment_N,) = torch_accumulator(x.dtype), dense(segment_N)
    if num == 0:
        return tuple(x.new_zeros(shape, dtype=acc) for shape in ((num_segments,), *[(num_segments, channels)] * 2))
    plan = plan or statistics_plan(num, pixels, channels, x.element_size())
    runs, lanes = plan.parts, plan.rows // plan.fold
    count_RS, (mean_RSC, m2_RSC) = (
        x.new_empty((runs, num_segments), dtype=acc),
        x.new_empty((2, runs, num_segments, channels), dtype=acc),
    )
    count_S, mean_SC, m2_SC = (
        x.new_empty(shape, dtype=acc) for shape in ((num_segments,), *[(num_segments, channels)] * 2)
    )
    with torch.cuda.device_of(x):
        _stats_kernel[(runs * plan.channel_blocks(channels),)](
            x, segment_N, count_RS, mean_RSC, m2_RSC, num * plan.tiles_per_image(pixels), pixels, channels, runs,
            S=num_segments, S_PAD=triton.next_power_of_2(num_segments), ACC=accumulator(x.dtype), FOLD=plan.fold,
            LANES=lanes, BLOCK_C=plan.channels, **plan.options(),
            STAGES=plan.stages,
        )  # fmt: skip
        # 32 bytes of each row: the smallest piece of memory that is read at once, for as many programs as possible.
        _merge_stats_kernel[(num_segments * triton.cdiv(channels, 8),)](
            count_RS, mean_RSC, m2_RSC, count_S, mean_SC, m2_SC, channels, runs,
            S=num_segments, ACC=accumulator(x.dtype), BLOCK_R=triton.next_power_of_2(runs), BLOCK_C=8, num_warps=8,
        )  # fmt: skip
    return count_S, mean_SC, m2_SC


def apply(
    x: Tensor,
    weight_GC: Tensor,
    bias_GC: Tensor,
    mean_SC: Tensor,
    var_SC: Tensor,
    *,
    segment_N: Tensor,
    groups: Sequence[int],
    film_scale_LC: Tensor | None,
    film_shift_LC: Tensor | None,
    film_row_N: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    plan: Plan | None = None,
) -> Tensor:
    """Normalise with given statistics, modulate, add, activate: one read of x, one of the residual, one write.

    Args:
        x: [N, C, H, W] in channels_last.
        weight_GC: Affine scale.
        bias_GC: Affine shift.
        mean_SC: Mean of each segment.
        var_SC: Biased variance of each segment.
        segment_N: Segment of each image.
        groups: Norm group of each segment.
        film_scale_LC: FiLM scale or None.
        film_shift_LC: FiLM shift, given exactly with the scale.
        film_row_N: Row of each image in them, given exactly with the scale.
        residual: [N, C, H, W] in channels_last or None.
        relu: ReLU or identity.
        eps: Added to the variance.
        plan: Tile shape, else `elementwise_plan`.

    Returns:
        [N, C, H, W] in the dtype of `x`, channels_last.
    """
    num, pixels, channels = shape_of(x)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    plan = plan or elementwise_plan(pixels, channels, x.element_size())
    grid = num * plan.tiles_per_image(pixels) * plan.channel_blocks(channels)
    if grid == 0:
        return y
    assert residual is None or shape_of(residual) == shape_of(x)
    small = dense(weight_GC, bias_GC, mean_SC, var_SC, film_scale_LC, film_shift_LC, segment_N, film_row_N)
    with torch.cuda.device_of(x):
        _apply_kernel[(grid,)](
            x, residual, y, *small, pixels, channels, pack_groups(groups),
            EPS=eps, RELU=relu, ACC=accumulator(x.dtype), ROWS=plan.rows, BLOCK_C=plan.channels,
            **plan.options(),
        )  # fmt: skip
    return y


def modulate(
    x: Tensor,
    scale_LC: Tensor,
    shift_LC: Tensor,
    row_N: Tensor,
    *,
    residual: Tensor | None,
    relu: bool,
    plan: Plan | None = None,
) -> Tensor:
    """act(scale[row] * x + shift[row] + residual): one read of x, one of the residual, one write.

    Args:
        x: [N, C, H, W] in channels_last.
        scale_LC: Scale of each row.
        shift_LC: Shift of each row.
        row_N: Row of each image.
        residual: [N, C, H, W] in channels_last or None.
        relu: ReLU or identity.
        plan: Tile shape, else `elementwise_plan`.

    Returns:
        [N, C, H, W] in the dtype of `x`, channels_last.
    """
    num, pixels, channels = shape_of(x)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    plan = plan or elementwise_plan(pixels, channels, x.element_size())
    grid = num * plan.tiles_per_image(pixels) * plan.channel_blocks(channels)
    if grid == 0:
        return y
    assert residual is None or shape_of(residual) == shape_of(x)
    with torch.cuda.device_of(x):
        _modulate_kernel[(grid,)](
            x, residual, y, *dense(scale_LC, shift_LC, row_N), pixels, channels,
            RELU=relu, ACC=accumulator(x.dtype), ROWS=plan.rows, BLOCK_C=plan.channels, **plan.options(),
        )  # fmt: skip
    return y


def update_running(
    running_mean_GC: Tensor,
    running_var_GC: Tensor,
    count_S: Tensor,
    mean_SC: Tensor,
    var_SC: Tensor,
    groups: Sequence[int],
    momentum: float,
) -> None:
    """Move the running statistics of each group, segment after segment, in place.

    An empty segment moves nothing; a segment of one value moves only the mean (it has no unbiased variance).

    Args:
        running_mean_GC: Moved in place; row-major.
        running_var_GC: Moved in place, towards the unbiased variance; row-major.
        count_S: Number of values.
        mean_SC: Mean of each segment.
        var_SC: Biased variance of each segment.
        groups: Norm group of each segment; a group may have several segments.
        momentum: Weight of a segment's statistics.
    """
    assert running_mean_GC.is_contiguous() and running_var_GC.is_contiguous()
    num_groups, channels = running_mean_GC.shape
    block = 128
    with torch.cuda.device_of(mean_SC):
        _update_running_kernel[(num_groups * triton.cdiv(channels, block),)](
            running_mean_GC, running_var_GC, *dense(count_S, mean_SC, var_SC), channels, pack_groups(groups),
            MOMENTUM=momentum, S=len(groups), ACC=accumulator(mean_SC.dtype), BLOCK_C=block, num_warps=4,
        )  # fmt: skip
