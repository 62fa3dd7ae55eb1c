"""Backward passes as Triton kernels: sums over pixels and images, then the gradient of the input.

    dz = dy * 1[y > 0]        xhat = (x - mean_s) * rstd_s        u = film_scale * dz
    S1[n,c] = sum_p dz        S2[n,c] = sum_p dz * xhat                                          one read of dy, y, x
    d_shift[l] = sum S1       d_scale[l] = sum (weight_g * S2 + bias_g * S1)                     images of row l
    d_bias[g] = sum scale*S1  d_weight[g] = sum scale*S2                                         images of group g
    sum_u[s] = sum scale*S1   sum_u_xhat[s] = sum scale*S2                                       images of segment s
    dx = weight_g * rstd_s * (u - m1_s - xhat * m2_s)                                            second read

(Ioffe and Szegedy, "Batch Normalization", ICML 2015, section 3, with FiLM between the norm and the ReLU.) Sums have a
fixed order and no atomics. `modulate_grads` is the same for a site whose statistics are constants.

Images are [N, C, H, W] in channels_last. Nothing here waits for the device or copies to it. `plan` overrides the tile
shape (`kernels.tiling`), for tests. Letters: N images, C channels, P = H*W pixels, G norm groups, S segments, L
distinct lambdas, U = N * splits units, of which each has a row of S1 and S2.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiling import (
    Plan,
    accumulator,
    below_relu,
    dense,
    elementwise_plan,
    gradients_plan,
    group_of,
    image_tile,
    load_row,
    pack_groups,
    reciprocal_std,
    shape_of,
    torch_accumulator,
)


@triton.jit
def _reduce_grads_kernel(
    dy_ptr, y_ptr, x_ptr, mean_ptr, var_ptr, segment_ptr, s1_UC_ptr, s2_UC_ptr, P, C, SPLITS, EPS: tl.constexpr,
    ACC: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """S1 and S2 of one split of one image. Without statistics (None) xhat is x; without ReLU y is None."""
    blocks = tl.cdiv(C, BLOCK_C)
    u = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = u // SPLITS
    per_split = tl.cdiv(tl.cdiv(P, FOLD * LANES), SPLITS) * (FOLD * LANES)
    begin = u % SPLITS * per_split
    end = tl.minimum(begin + per_split, P)
    row = (tl.arange(0, FOLD) * LANES)[:, None, None] + tl.arange(0, LANES)[None, :, None]
    offset = row * C + c[None, None, :]
    if mean_ptr is not None:
        s = tl.load(segment_ptr + n).to(tl.int32)
        mean = load_row(mean_ptr, s, C, c, ACC)
    s1_LC = tl.zeros((LANES, BLOCK_C), ACC)
    s2_LC = tl.zeros((LANES, BLOCK_C), ACC)
    for first in range(begin, end, FOLD * LANES):
        at = (n.to(tl.int64) * P + first) * C + offset
        mask = (first + row < end) & (c < C)[None, None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        dz = below_relu(dy, y_ptr, at, mask)
        if mean_ptr is not None:
            x = x - mean[None, None, :]
        s1_LC += tl.sum(dz, 0)
        s2_LC += tl.sum(dz * x, 0)
    s2 = tl.sum(s2_LC, 0)
    if mean_ptr is not None:
        s2 *= reciprocal_std(load_row(var_ptr, s, C, c, ACC), EPS)
    to = u.to(tl.int64) * C + c
    tl.store(s1_UC_ptr + to, tl.sum(s1_LC, 0), mask=c < C)
    tl.store(s2_UC_ptr + to, s2, mask=c < C)


@triton.jit
def _merge_grads_kernel(
    s1_UC_ptr, s2_UC_ptr, weight_ptr, bias_ptr, film_scale_ptr, segment_ptr, film_row_ptr, d_weight_ptr, d_bias_ptr,
    d_scale_ptr, d_shift_ptr, sum_u_ptr, sum_u_xhat_ptr, U, C, SPLITS, groups, S: tl.constexpr, G: tl.constexpr,
    ACC: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over the units of one segment, group or FiLM row: S + G + L short loops that do not wait for one another.

    A unit is read only by the programs it belongs to. Without segments (S = G = 0) it is the sums of `modulate`.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    key = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    sum1_UC = tl.zeros((BLOCK_U, BLOCK_C), ACC)
    sum2_UC = tl.zeros((BLOCK_U, BLOCK_C), ACC)
    for first in range(0, U, BLOCK_U):
        u = first + tl.arange(0, BLOCK_U)
        n = u // SPLITS
        member = tl.zeros((BLOCK_U,), tl.int1)
        if S > 0:
            segment = tl.load(segment_ptr + n, mask=u < U, other=0).to(tl.int32)
            group = group_of(groups, segment)
            member = tl.where(key < S, segment == key, group == key - S)
        if film_row_ptr is not None:
            row = tl.load(film_row_ptr + n, mask=u < U, other=0).to(tl.int32)
            member = tl.where(key < S + G, member, row == key - (S + G))
        mask = (member & (u < U))[:, None] & (c < C)[None, :]
        at = u.to(tl.int64)[:, None] * C + c[None, :]
        s1 = tl.load(s1_UC_ptr + at, mask=mask, other=0.0)
        s2 = tl.load(s2_UC_ptr + at, mask=mask, other=0.0)
        if S > 0 and film_row_ptr is not None:
            if key < S + G:
                scale = tl.load(film_scale_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC)
                s1 = scale * s1
                s2 = scale * s2
            else:
                weight = tl.load(weight_ptr + group[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC)
                bias = tl.load(bias_ptr + group[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC)
                s2 = weight * s2 + bias * s1
        sum1_UC += s1
        sum2_UC += s2
    sum1 = tl.sum(sum1_UC, 0)
    sum2 = tl.sum(sum2_UC, 0)
    if S > 0:
        if key < S:
            tl.store(sum_u_ptr + key * C + c, sum1, mask=c < C)
            tl.store(sum_u_xhat_ptr + key * C + c, sum2, mask=c < C)
        elif key < S + G:
            tl.store(d_bias_ptr + (key - S) * C + c, sum1, mask=c < C)
            tl.store(d_weight_ptr + (key - S) * C + c, sum2, mask=c < C)
    if film_row_ptr is not None:
        film = (c < C) & (key >= S + G)
        tl.store(d_shift_ptr + (key - (S + G)) * C + c, sum1, mask=film)
        tl.store(d_scale_ptr + (key - (S + G)) * C + c, sum2, mask=film)


@triton.jit
def _input_grad_kernel(
    dy_ptr, y_ptr, x_ptr, dx_ptr, d_residual_ptr, weight_ptr, mean_ptr, var_ptr, m1_ptr, m2_ptr, film_scale_ptr,
    segment_ptr, film_row_ptr, P, C, groups, EPS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of dx and of the residual's gradient. Absent FiLM, ReLU (y) and residual are None."""
    n, c, start, offset, mask = image_tile(P, C, ROWS, BLOCK_C)
    at = start + offset
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    dz = below_relu(dy, y_ptr, at, mask)
    if d_residual_ptr is not None:
        tl.store(d_residual_ptr + at, dz.to(d_residual_ptr.dtype.element_ty), mask=mask)
    s = tl.load(segment_ptr + n).to(tl.int32)
    rstd = reciprocal_std(load_row(var_ptr, s, C, c, ACC), EPS)
    a = load_row(weight_ptr, group_of(groups, s), C, c, ACC) * rstd
    slope = rstd * load_row(m2_ptr, s, C, c, ACC)
    if film_row_ptr is not None:
        row = tl.load(film_row_ptr + n).to(tl.int32)
        dz = load_row(film_scale_ptr, row, C, c, ACC)[None, :] * dz
    centred = x - load_row(mean_ptr, s, C, c, ACC)[None, :]
    dx = a[None, :] * (dz - load_row(m1_ptr, s, C, c, ACC)[None, :] - slope[None, :] * centred)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _modulate_grad_kernel(
    dy_ptr, y_ptr, dx_ptr, d_residual_ptr, scale_ptr, row_ptr, P, C, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of dx = scale * dz and of the residual's gradient. Absent ReLU (y) and residual are None."""
    n, c, start, offset, mask = image_tile(P, C, ROWS, BLOCK_C)
    at = start + offset
    dz = below_relu(tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC), y_ptr, at, mask)
    if d_residual_ptr is not None:
        tl.store(d_residual_ptr + at, dz.to(d_residual_ptr.dtype.element_ty), mask=mask)
    row = tl.load(row_ptr + n).to(tl.int32)
    dx = load_row(scale_ptr, row, C, c, ACC)[None, :] * dz
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def reduce_grads(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight_GC: Tensor,
    bias_GC: Tensor,
    mean_SC: Tensor,
    var_SC: Tensor,
    *,
    segment_N: Tensor,
    groups: Sequence[int],
    film_scale_LC: Tensor | None,
    film_row_N: Tensor | None,
    relu: bool,
    eps: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """First pass of the backward: every sum over pixels and images, in one read of dy, y and x.

    Args:
        dy: [N, C, H, W] in channels_last, gradient of the output.
        y: Output; not read without ReLU.
        x: Input.
        weight_GC: Affine scale.
        bias_GC: Affine shift.
        mean_SC: Statistics of the forward.
        var_SC: Statistics of the forward, biased variance.
        segment_N: Segment of each image.
        groups: Norm group of each segment.
        film_scale_LC: FiLM scale or None.
        film_row_N: Row of each image in it, or None.
        relu: Whether the forward had a ReLU.
        eps: That of the forward.
        plan: Tile shape, else `gradients_plan`.

    Returns:
        d_weight_GC, d_bias_GC, d_film_scale_LC or None, d_film_shift_LC or None, and the sums of u and u * xhat per
        segment [S, C]; all in the accumulator dtype.
    """
    acc = torch_accumulator(x.dtype)
    like = (weight_GC, bias_GC, film_scale_LC, film_scale_LC, mean_SC, mean_SC)
    sums = [None if t is None else torch.empty(t.shape, dtype=acc, device=x.device) for t in like]
    weight_GC, bias_GC, film_scale_LC, segment_N, film_row_N = dense(
        weight_GC, bias_GC, film_scale_LC, segment_N, film_row_N
    )
    s1_UC, s2_UC, splits = _sums_of_images(dy, y if relu else None, x, mean_SC, var_SC, segment_N, eps, plan)
    _merge_grads(s1_UC, s2_UC, splits, (weight_GC, bias_GC, film_scale_LC), segment_N, film_row_N, sums, groups=groups)
    return tuple(sums)


def _sums_of_images(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    mean_SC: Tensor | None,
    var_SC: Tensor | None,
    segment_N: Tensor | None,
    eps: float,
    plan: Plan | None,
) -> tuple[Tensor, Tensor, int]:
    """S1 and S2 of every unit, and the units per image."""
    num, pixels, channels = shape_of(x)
    assert shape_of(dy) == shape_of(x) and (y is None or shape_of(y) == shape_of(x))
    plan = plan or gradients_plan(num, pixels, channels, x.element_size())
    s1_UC, s2_UC = (
        torch.empty((num * plan.parts, channels), dtype=torch_accumulator(x.dtype), device=x.device) for _ in range(2)
    )
    if num:
        with torch.cuda.device_of(x):
            _reduce_grads_kernel[(num * plan.parts * plan.channel_blocks(channels),)](
                dy, y, x, *dense(mean_SC, var_SC), segment_N, s1_UC, s2_UC, pixels, channels, plan.parts,
                EPS=eps, ACC=accumulator(x.dtype), FOLD=plan.fold, LANES=plan.rows // plan.fold,
                BLOCK_C=plan.channels, **plan.options(),
            )  # fmt: skip
    return s1_UC, s2_UC, plan.parts


def _merge_grads(
    s1_UC: Tensor,
    s2_UC: Tensor,
    splits: int,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    segment_N: Tensor | None,
    row_N: Tensor | None,
    sums: Sequence[Tensor | None],
    *,
    groups: Sequence[int],
) -> None:
    """Write `sums`: d_weight, d_bias, d_scale, d_shift, sum_u, sum_u_xhat, of which absent ones are None."""
    units, channels = s1_UC.shape
    num_groups = 0 if sums[0] is None else len(sums[0])
    keys = len(groups) + num_groups + (0 if sums[2] is None else len(sums[2]))
    # 4096 sums at a time, 16 channels (64 bytes of a row) wide: few turns of the loop, and many programs.
    block_u, block_c = 256, 16
    with torch.cuda.device_of(s1_UC):
        _merge_grads_kernel[(keys * triton.cdiv(channels, block_c),)](
            s1_UC, s2_UC, *parameters, segment_N, row_N, *sums, units, channels, splits, pack_groups(groups),
            S=len(groups), G=num_groups, ACC=accumulator(s1_UC.dtype), BLOCK_U=block_u, BLOCK_C=block_c, num_warps=8,
        )  # fmt: skip


def input_grad(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight_GC: Tensor,
    mean_SC: Tensor,
    var_SC: Tensor,
    m1_SC: Tensor,
    m2_SC: Tensor,
    *,
    segment_N: Tensor,
    groups: Sequence[int],
    film_scale_LC: Tensor | None,
    film_row_N: Tensor | None,
    relu: bool,
    eps: float,
    want_residual: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Second pass of the backward: dx = weight * rstd * (u - m1 - xhat * m2), and dz for the residual.

    Args:
        dy: [N, C, H, W] in channels_last, gradient of the output.
        y: Output; not read without ReLU.
        x: Input.
        weight_GC: Affine scale.
        mean_SC: Statistics of the forward.
        var_SC: Statistics of the forward, biased variance.
        m1_SC: Mean of u over a segment.
        m2_SC: Mean of u * xhat over a segment.
        segment_N: Segment of each image.
        groups: Norm group of each segment.
        film_scale_LC: FiLM scale or None.
        film_row_N: Row of each image in it, or None.
        relu: Whether the forward had a ReLU.
        eps: That of the forward.
        want_residual: Return dz too.
        plan: Tile shape, else `elementwise_plan`.

    Returns:
        dx in the dtype of `x`, d_residual in that of `dy` or None.
    """
    num, pixels, channels = shape_of(x)
    assert shape_of(dy) == shape_of(x) and (not relu or shape_of(y) == shape_of(x))
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    d_residual = torch.empty_like(dy, memory_format=torch.channels_last) if want_residual else None
    plan = plan or elementwise_plan(pixels, channels, x.element_size(), max_registers=128)
    grid = num * plan.tiles_per_image(pixels) * plan.channel_blocks(channels)
    if grid:
        small = dense(weight_GC, mean_SC, var_SC, m1_SC, m2_SC, film_scale_LC, segment_N, film_row_N)
        with torch.cuda.device_of(x):
            # Product and difference rounded each by itself: a segment of one value then has u - m1 = 0 exactly.
            _input_grad_kernel[(grid,)](
                dy, y if relu else None, x, dx, d_residual, *small, pixels, channels, pack_groups(groups),
                EPS=eps, ACC=accumulator(x.dtype), ROWS=plan.rows, BLOCK_C=plan.channels, **plan.options(),
                enable_fp_fusion=False,
            )  # fmt: skip
    return dx, d_residual


def modulate_grads(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor | None,
    scale_LC: Tensor,
    row_N: Tensor,
    *,
    relu: bool,
    want_affine: bool,
    want_residual: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `modulate`: one read of dy and y, one write; with `want_affine` they and x are read once more.

    Args:
        dy: [N, C, H, W] in channels_last, gradient of the output.
        y: Output; not read without ReLU.
        x: Input; not read without `want_affine`.
        scale_LC: Scale of each row.
        row_N: Row of each image.
        relu: Whether the forward had a ReLU.
        want_affine: Return d_scale and d_shift.
        want_residual: Return dz.
        plan: Tile shape, else `elementwise_plan` and `gradients_plan`.

    Returns:
        dx, d_scale_LC or None, d_shift_LC or None (both in the accumulator dtype), d_residual or None.
    """
    num, pixels, channels = shape_of(dy)
    y = y if relu else None
    scale_LC, row_N = dense(scale_LC, row_N)
    d_scale = d_shift = None
    if want_affine:
        s1_UC, s2_UC, splits = _sums_of_images(dy, y, x, None, None, None, 1.0, plan)
        d_scale, d_shift = (torch.empty(scale_LC.shape, dtype=s1_UC.dtype, device=dy.device) for _ in range(2))
        sums = (None, None, d_scale, d_shift, None, None)
        _merge_grads(s1_UC, s2_UC, splits, (None, None, None), None, row_N, sums, groups=())
    dx = torch.empty_like(dy, memory_format=torch.channels_last)
    d_residual = torch.empty_like(dy, memory_format=torch.channels_last) if want_residual else None
    plan = plan or elementwise_plan(pixels, channels, dy.element_size())
    grid = num * plan.tiles_per_image(pixels) * plan.channel_blocks(channels)
    if grid:
        with torch.cuda.device_of(dy):
            _modulate_grad_kernel[(grid,)](
                dy, y, dx, d_residual, scale_LC, row_N, pixels, channels,
                ACC=accumulator(dy.dtype), ROWS=plan.rows, BLOCK_C=plan.channels, **plan.options(),
            )  # fmt: skip
    return dx, d_scale, d_shift, d_residual
