"""Public operators: argument checks, choice of backend, running statistics.

`film_dual_bn` is one normalisation site of a network in training or evaluation; `modulate` is the same site once its
statistics are constants (attack steps, test time). Formulas: `kernels.reference`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import torch_backend

_BACKENDS = ("auto", "torch")


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
) -> Tensor:
    """Y = act( FiLM( DualBN(x) ) + residual ).

    Args:
        x: [N, C, H, W], float64, float32, bfloat16 or float16. Statistics are float32 (float64 for float64 input).
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
        backend: "auto" or "torch".

    Returns:
        [N, C, H, W] in the dtype of `x`.

    Raises:
        ValueError: An argument has the wrong shape, dtype, device or range; the message names it.
    """
    _check_images(x, residual, backend)
    num_groups = len(weight) if weight.dim() == 2 else 0
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        _check_shape(name, tensor, (num_groups, x.shape[1]), x)
    _check_index("segment", segment, len(group_of_segment), x)
    if not all(0 <= g < num_groups for g in group_of_segment):
        raise ValueError(f"group_of_segment={tuple(group_of_segment)}: every group must lie in [0, {num_groups})")
    if not eps > 0:
        raise ValueError(f"eps={eps}: must be > 0")
    _check_film(film_scale, film_shift, film_row, x)

    acc = torch_backend.accumulator(x.dtype)
    if training:
        count_S, mean_SC, var_SC = torch_backend.segment_statistics(
            x.to(acc), segment, len(group_of_segment), sync=sync
        )
        torch_backend.update_running(running_mean, running_var, count_S, mean_SC, var_SC, group_of_segment, momentum)
    else:
        mean_SC, var_SC = (
            torch_backend.rows_of_groups(r.detach(), group_of_segment).to(acc) for r in (running_mean, running_var)
        )
    return torch_backend.forward(
        x, weight, bias, mean_SC, var_SC, segment=segment, group_of_segment=group_of_segment, film_scale=film_scale,
        film_shift=film_shift, film_row=film_row, residual=residual, relu=relu, eps=eps,
    )  # fmt: skip


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    row: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Y = act(scale[row] * x + shift[row] + residual): a normalisation site whose statistics are constants.

    Args:
        x: [N, C, H, W], any float dtype.
        scale: [L, C].
        shift: [L, C].
        row: [N] int32 or int64 in [0, L).
        residual: [N, C, H, W] or None.
        relu: ReLU (True) or identity.
        backend: "auto" or "torch".

    Returns:
        [N, C, H, W] in the dtype of `x`.

    Raises:
        ValueError: An argument has the wrong shape, dtype, device or range; the message names it.
    """
    _check_images(x, residual, backend)
    num_rows = len(scale) if scale.dim() == 2 else 0
    _check_shape("scale", scale, (num_rows, x.shape[1]), x)
    _check_shape("shift", shift, (num_rows, x.shape[1]), x)
    _check_index("row", row, num_rows, x)
    return torch_backend.modulate(x, scale, shift, row, residual=residual, relu=relu)


def _check_images(x: Tensor, residual: Tensor | None, backend: str) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected [N, C, H, W] floating point, got {tuple(x.shape)} {x.dtype}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(_BACKENDS)}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(tensor.shape) != shape or 0 in shape:
        raise ValueError(f"{name}: expected shape {shape} with C={x.shape[1]}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like x, got {tensor.device}")


def _check_index(name: str, index: Tensor, limit: int, x: Tensor) -> None:
    if tuple(index.shape) != (len(x),) or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected [{len(x)}] int32 or int64, got {tuple(index.shape)} {index.dtype}")
    if index.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like x, got {index.device}")
    # A GPU would have to be waited for; there index_select itself stops on an index out of range.
    if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < limit:
        raise ValueError(f"{name}: expected values in [0, {limit}), got {int(index.min())} to {int(index.max())}")


def _check_film(scale: Tensor | None, shift: Tensor | None, row: Tensor | None, x: Tensor) -> None:
    given = [name for name, t in (("film_scale", scale), ("film_shift", shift), ("film_row", row)) if t is not None]
    if len(given) not in (0, 3):
        raise ValueError(f"film_scale, film_shift, film_row: give all three or none, got only {', '.join(given)}")
    if scale is not None:
        num_rows = len(scale) if scale.dim() == 2 else 0
        _check_shape("film_scale", scale, (num_rows, x.shape[1]), x)
        _check_shape("film_shift", shift, (num_rows, x.shape[1]), x)
        _check_index("film_row", row, num_rows, x)
