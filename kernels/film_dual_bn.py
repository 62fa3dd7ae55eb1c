"""Public operators: choice of backend and form (eager or registered), running statistics.

`film_dual_bn` is one normalisation site of a network in training or evaluation; `modulate` is the same site once its
statistics are constants (attack steps, test time). Formulas: `kernels.reference`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import operators, registered
from kernels.checks import check_modulate, check_site, choose_backend, in_channels_last
from kernels.torch_backend import accumulator, rows_of_groups


def film_dual_bn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    segment: Tensor,
    group_of_segment: Sequence[int],
    film_scale: Tensor | None = None,
    film_shift: Tensor | None = None,
    film_row: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    sync: bool = False,
    backend: str = "auto",
    site: str = "film_dual_bn",
) -> Tensor:
    """Y = act( FiLM( DualBN(x) ) + residual ).

    Args:
        x: [N, C, H, W], float64, float32, bfloat16 or float16, contiguous in channels_last; another layout is converted
            with a warning. Statistics are float32 (float64 for float64 input).
        weight: [G, C] affine scale of each norm group.
        bias: [G, C] affine shift of each norm group.
        running_mean: [G, C]; updated in place when `training`.
        running_var: [G, C]; updated in place when `training`, with the unbiased variance, segment after segment.
        segment: [N] int32 or int64 in [0, S): whose batch statistics an image belongs to. A segment may be empty.
        group_of_segment: The norm group of each of the S segments, e.g. (0, 1, 1).
        film_scale: [L, C], or None at a site without FiLM.
        film_shift: [L, C], given exactly when `film_scale` is.
        film_row: [N] int32 or int64 in [0, L), given exactly when `film_scale` is.
        residual: [N, C, H, W], added before the activation, or None.
        relu: ReLU (True) or identity.
        training: Use batch statistics and move the running ones; False uses the running ones.
        momentum: Weight of a segment's statistics in the running ones, in [0, 1].
        eps: Added to the variance, > 0.
        sync: Share batch statistics over all ranks of the default process group; every rank must call.
        backend: "torch" (plain PyTorch), "triton" (an NVIDIA GPU, or a CPU under TRITON_INTERPRET=1), or "auto": triton
            on a GPU, torch elsewhere.
        site: Name of this site in messages.

    Returns:
        [N, C, H, W] in the dtype of `x`, in channels_last.

    Raises:
        ValueError: An argument has the wrong shape, dtype, device or range; the message names it.
    """
    check_site(
        x, weight, bias, running_mean, running_var, segment, group_of_segment, film_scale, film_shift, film_row,
        residual, momentum, eps,
    )  # fmt: skip
    backend = choose_backend(backend, x, len(group_of_segment))
    x, residual = in_channels_last(x, residual, site)
    if not training:
        scale_NC, shift_NC = _folded(
            x, weight, bias, running_mean, running_var, segment, group_of_segment, film_scale, film_shift, film_row, eps
        )
        own_row_N = torch.arange(len(x), device=x.device)
        return _modulate(x, scale_NC, shift_NC, residual, own_row_N, relu, backend)
    is_traced = torch.compiler.is_compiling()
    run = registered.film_dual_bn if is_traced else operators.FusedSite.apply
    groups = list(group_of_segment)
    y, mean_SC, var_SC, count_S = run(
        x, weight, bias, film_scale, film_shift, residual, segment, film_row, groups, relu, eps, sync, backend
    )
    with torch.no_grad():
        if is_traced:
            registered.update_running(running_mean, running_var, count_S, mean_SC, var_SC, groups, momentum, backend)
        else:
            update = operators.passes(backend).update_running
            update(running_mean, running_var, count_S, mean_SC, var_SC, groups, momentum)
    return y


def _folded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    segment: Tensor,
    group_of_segment: Sequence[int],
    film_scale: Tensor | None,
    film_shift: Tensor | None,
    film_row: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Running statistics, affine parameters and FiLM as one (scale_NC, shift_NC), differentiable."""
    acc = accumulator(x.dtype)
    weight_SC, bias_SC, mean_SC, var_SC = (
        rows_of_groups(t, group_of_segment).to(acc) for t in (weight, bias, running_mean.detach(), running_var.detach())
    )
    a_SC = weight_SC * torch.rsqrt(var_SC + eps)
    scale_NC, shift_NC = (t.index_select(0, segment) for t in (a_SC, bias_SC - mean_SC * a_SC))
    if film_scale is not None:
        film_scale_NC, film_shift_NC = (t.to(acc).index_select(0, film_row) for t in (film_scale, film_shift))
        scale_NC, shift_NC = film_scale_NC * scale_NC, film_scale_NC * shift_NC + film_shift_NC
    return scale_NC, shift_NC


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    row: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    backend: str = "auto",
    site: str = "modulate",
) -> Tensor:
    """Y = act(scale[row] * x + shift[row] + residual): a normalisation site whose statistics are constants.

    Args:
        x: [N, C, H, W], any float dtype, contiguous in channels_last; another layout is converted with a warning.
        scale: [L, C].
        shift: [L, C].
        row: [N] int32 or int64 in [0, L).
        residual: [N, C, H, W] or None.
        relu: ReLU (True) or identity.
        backend: As in `film_dual_bn`.
        site: Name of this site in messages.

    Returns:
        [N, C, H, W] in the dtype of `x`, in channels_last.

    Raises:
        ValueError: An argument has the wrong shape, dtype, device or range; the message names it.
    """
    check_modulate(x, scale, shift, row, residual)
    x, residual = in_channels_last(x, residual, site)
    return _modulate(x, scale, shift, residual, row, relu, choose_backend(backend, x, 1))


def _modulate(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, row: Tensor, relu: bool, backend: str
) -> Tensor:
    run = registered.modulate if torch.compiler.is_compiling() else operators.FusedModulate.apply
    return run(x, scale, shift, residual, row, relu, backend)
