"""The passes of the operators in plain PyTorch: the CPU path. Nothing here waits for a device.

The same functions with the same meaning exist as Triton kernels (`kernels.triton_backend`); `kernels.operators` puts
either together. Images are [N, C, H, W] contiguous in channels_last and are worked on as [N, P, C]. Statistics are two
passes - the mean, then squared deviations from it - summed per image first, so that float32 sums stay short; the raw
second moment E[x^2] - E[x]^2 is never formed. Sums over images are products with a 0/1 matrix, whose order is fixed.

Letters: N images, C channels, P = H*W pixels, G norm groups, S segments, L distinct lambdas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics and sums are computed in: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of_groups(per_group_GC: Tensor, groups: Sequence[int]) -> Tensor:
    """[S, C] rows of a per-group tensor; Python indices, so that nothing is copied to the device."""
    return torch.stack([per_group_GC[g] for g in groups])


def segment_statistics(x: Tensor, segment_N: Tensor, num_segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values, mean and sum of squared deviations per segment and channel.

    Args:
        x: [N, C, H, W] in channels_last.
        segment_N: Segment of each image.
        num_segments: S; a segment without images gets 0, 0, 0.

    Returns:
        count_S, mean_SC, m2_SC in the accumulator dtype.
    """
    x_NPC = _pixels(x).to(accumulator(x.dtype))
    member_SN = _membership(segment_N, num_segments, x_NPC.dtype)
    images_S = member_SN.sum(1)
    mean_SC = (member_SN @ x_NPC.mean(1)) / images_S.clamp(min=1)[:, None]
    m2_NC = (x_NPC - _of_images(mean_SC, segment_N)).square_().sum(1)
    return images_S * x_NPC.shape[1], mean_SC, member_SN @ m2_NC


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
) -> Tensor:
    """Normalise with given statistics, modulate, add, activate; centred, a * (x - mean) + b, so nothing cancels.

    Returns:
        [N, C, H, W] in the dtype of `x`.
    """
    acc = accumulator(x.dtype)
    a_NC = (rows_of_groups(weight_GC, groups).to(acc) * torch.rsqrt(var_SC + eps)).index_select(0, segment_N)
    b_NC = rows_of_groups(bias_GC, groups).to(acc).index_select(0, segment_N)
    if film_scale_LC is not None:
        scale_NC = film_scale_LC.to(acc).index_select(0, film_row_N)
        a_NC, b_NC = scale_NC * a_NC, scale_NC * b_NC + film_shift_LC.to(acc).index_select(0, film_row_N)
    y, y_NPC = _new_images(x, acc)
    torch.sub(_pixels(x).to(acc), _of_images(mean_SC, segment_N), out=y_NPC)
    torch.addcmul(b_NC[:, None], a_NC[:, None], y_NPC, out=y_NPC)
    return _finish(y, residual, relu).to(x.dtype)


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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """First pass of the backward: every sum over pixels and images.

    With dz = dy * 1[y > 0], xhat = (x - mean) * rstd and u = film_scale * dz.

    Args:
        dy: [N, C, H, W] gradient of the output.
        y: Output; not read without ReLU.
        x: Input.
        weight_GC: Affine scale; `bias_GC` the shift.
        mean_SC: Statistics of the forward; `var_SC` the biased variance.
        segment_N: Segment of each image.
        groups: Norm group of each segment.
        film_scale_LC: FiLM scale or None.
        film_row_N: Row of each image in it, or None.
        relu: Whether the forward had a ReLU.
        eps: That of the forward.

    Returns:
        d_weight_GC, d_bias_GC, d_film_scale_LC or None, d_film_shift_LC or None, and the sums of u and u * xhat per
        segment [S, C]; all in the accumulator dtype.
    """
    acc = accumulator(x.dtype)
    dz_NPC = _pixels(_through_relu(dy, y, relu, acc))
    product_NPC = _pixels(x).to(acc) - _of_images(mean_SC, segment_N)
    product_NPC.mul_(dz_NPC)
    rstd_SC = torch.rsqrt(var_SC + eps)
    s1_NC, s2_NC = dz_NPC.sum(1), product_NPC.sum(1) * rstd_SC.index_select(0, segment_N)
    d_scale_LC = d_shift_LC = None
    if film_scale_LC is not None:
        member_LN = _membership(film_row_N, len(film_scale_LC), acc)
        weight_NC, bias_NC = (
            rows_of_groups(t, groups).to(acc).index_select(0, segment_N) for t in (weight_GC, bias_GC)
        )
        d_shift_LC = member_LN @ s1_NC
        d_scale_LC = member_LN @ (weight_NC * s2_NC + bias_NC * s1_NC)
        scale_NC = film_scale_LC.to(acc).index_select(0, film_row_N)
        s1_NC, s2_NC = scale_NC * s1_NC, scale_NC * s2_NC
    member_SN = _membership(segment_N, len(groups), acc)
    u_SC, u_xhat_SC = member_SN @ s1_NC, member_SN @ s2_NC
    d_weight_GC, d_bias_GC = (torch.zeros_like(weight_GC, dtype=acc) for _ in range(2))
    for s, g in enumerate(groups):
        d_weight_GC[g] += u_xhat_SC[s]
        d_bias_GC[g] += u_SC[s]
    return d_weight_GC, d_bias_GC, d_scale_LC, d_shift_LC, u_SC, u_xhat_SC


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
) -> tuple[Tensor, Tensor | None]:
    """Second pass of the backward: dx = weight * rstd * (u - m1 - xhat * m2), and dz for the residual.

    Args:
        dy: [N, C, H, W] gradient of the output.
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

    Returns:
        dx in the dtype of `x`, d_residual or None.
    """
    acc = accumulator(x.dtype)
    dz = _through_relu(dy, y, relu, acc)
    rstd_SC = torch.rsqrt(var_SC + eps)
    a_SC = rows_of_groups(weight_GC, groups).to(acc) * rstd_SC
    a_NC = a_SC.index_select(0, segment_N)
    if film_scale_LC is not None:
        a_NC = a_NC * film_scale_LC.to(acc).index_select(0, film_row_N)
    dx, dx_NPC = _new_images(x, acc)
    torch.sub(_pixels(x).to(acc), _of_images(mean_SC, segment_N), out=dx_NPC)
    slope_N1C, offset_N1C = _of_images(-a_SC * rstd_SC * m2_SC, segment_N), _of_images(-a_SC * m1_SC, segment_N)
    torch.addcmul(offset_N1C, slope_N1C, dx_NPC, out=dx_NPC)
    dx_NPC.addcmul_(a_NC[:, None], _pixels(dz))
    return dx.to(x.dtype), dz.to(x.dtype) if want_residual else None


def modulate(
    x: Tensor, scale_LC: Tensor, shift_LC: Tensor, row_N: Tensor, *, residual: Tensor | None, relu: bool
) -> Tensor:
    """act(scale[row] * x + shift[row] + residual)."""
    acc = accumulator(x.dtype)
    scale_N1C, shift_N1C = _of_images(scale_LC.to(acc), row_N), _of_images(shift_LC.to(acc), row_N)
    y, y_NPC = _new_images(x, acc)
    torch.addcmul(shift_N1C, scale_N1C, _pixels(x).to(acc), out=y_NPC)
    return _finish(y, residual, relu).to(x.dtype)


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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `modulate`; `x` is read only with `want_affine`.

    Returns:
        dx, d_scale_LC or None, d_shift_LC or None, d_residual or None.
    """
    acc = accumulator(dy.dtype)
    dz = _through_relu(dy, y, relu, acc)
    d_scale_LC = d_shift_LC = None
    if want_affine:
        member_LN, dz_NPC = _membership(row_N, len(scale_LC), acc), _pixels(dz)
        d_scale_LC = member_LN @ (dz_NPC * _pixels(x).to(acc)).sum(1)
        d_shift_LC = member_LN @ dz_NPC.sum(1)
    scale_NC11 = scale_LC.to(acc).index_select(0, row_N)[:, :, None, None]
    # Without ReLU dz is dy itself, which is not ours to overwrite.
    dx = dz.mul_(scale_NC11) if relu and not want_residual else dz * scale_NC11
    return dx.to(dy.dtype), d_scale_LC, d_shift_LC, dz.to(dy.dtype) if want_residual else None


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    count_S: Tensor,
    mean_SC: Tensor,
    var_SC: Tensor,
    groups: Sequence[int],
    momentum: float,
) -> None:
    """Move the running statistics of each group, segment after segment, in place.

    An empty segment moves nothing; a segment of one value moves only the mean (it has no unbiased variance).
    """
    # Cast before the product: momentum times a boolean would be rounded to float32.
    mean_weight_S = momentum * (count_S > 0).to(count_S.dtype)
    var_weight_S = momentum * (count_S > 1).to(count_S.dtype)
    unbiased_SC = var_SC * (count_S / (count_S - 1).clamp(min=1))[:, None]
    for s, g in enumerate(groups):
        running_mean[g] += mean_weight_S[s] * (mean_SC[s] - running_mean[g])
        running_var[g] += var_weight_S[s] * (unbiased_SC[s] - running_var[g])


def _pixels(x: Tensor) -> Tensor:
    """[N, P, C] view of [N, C, H, W] in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _new_images(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """New [N, C, H, W] in channels_last, no view of anything, and the [N, P, C] view to fill it by."""
    images = torch.empty_like(like, dtype=dtype, memory_format=torch.channels_last)
    return images, _pixels(images)


def _of_images(rows: Tensor, index_N: Tensor) -> Tensor:
    """[N, 1, C] row of each image."""
    return rows.index_select(0, index_N)[:, None]


def _membership(index_N: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, N] 0/1 matrix."""
    return (index_N[None] == torch.arange(num_rows, device=index_N.device)[:, None]).to(dtype)


def _through_relu(dy: Tensor, y: Tensor | None, relu: bool, acc: torch.dtype) -> Tensor:
    """Gradient below the ReLU, a new tensor where there is one."""
    return (torch.ops.aten.threshold_backward(dy, y, 0) if relu else dy).to(acc)


def _finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Add and activate in place."""
    if residual is not None:
        y.add_(residual)
    return y.relu_() if relu else y
