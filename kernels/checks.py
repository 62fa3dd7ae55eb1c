"""Checks of the operators' arguments: a ValueError in one line that names the argument and what would be right."""

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

_BACKENDS = ("auto", "torch", "triton")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MAX_SEGMENTS = 8
"""Segments the Triton kernels hold at once; the method needs three."""


def check_site(
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
    residual: Tensor | None,
    momentum: float,
    eps: float,
) -> None:
    """Check the arguments of `film_dual_bn`; see there."""
    _check_images(x, residual)
    num_groups = len(weight) if weight.dim() == 2 else 0
    parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in parameters.items():
        _check_rows(name, tensor, (num_groups, x.shape[1]), x)
    if not group_of_segment or not all(0 <= g < num_groups for g in group_of_segment):
        raise ValueError(f"group_of_segment={tuple(group_of_segment)}: every group must lie in [0, {num_groups})")
    _check_index("segment", segment, len(group_of_segment), x)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum}: must lie in [0, 1]")
    if not eps > 0:
        raise ValueError(f"eps={eps}: must be > 0")
    films = {"film_scale": film_scale, "film_shift": film_shift, "film_row": film_row}
    given = [name for name, tensor in films.items() if tensor is not None]
    if len(given) not in (0, 3):
        raise ValueError(f"film_scale, film_shift, film_row: give all three or none, got only {', '.join(given)}")
    if given:
        num_rows = len(film_scale) if film_scale.dim() == 2 else 0
        _check_rows("film_scale", film_scale, (num_rows, x.shape[1]), x)
        _check_rows("film_shift", film_shift, (num_rows, x.shape[1]), x)
        _check_index("film_row", film_row, num_rows, x)


def check_modulate(x: Tensor, scale: Tensor, shift: Tensor, row: Tensor, residual: Tensor | None) -> None:
    """Check the arguments of `modulate`; see there."""
    _check_images(x, residual)
    num_rows = len(scale) if scale.dim() == 2 else 0
    _check_rows("scale", scale, (num_rows, x.shape[1]), x)
    _check_rows("shift", shift, (num_rows, x.shape[1]), x)
    _check_index("row", row, num_rows, x)


def choose_backend(backend: str, x: Tensor, num_segments: int) -> str:
    """The backend that runs, "torch" or "triton".

    Args:
        backend: What the caller asks for; "auto" is triton on a GPU, torch elsewhere.
        x: Images.
        num_segments: S.

    Raises:
        ValueError: It is unknown or cannot run here.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(_BACKENDS)}")
    if backend == "auto":
        return "triton" if x.is_cuda and num_segments <= _MAX_SEGMENTS else "torch"
    if backend == "triton":
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            needed = "needs a GPU, or TRITON_INTERPRET=1 set before triton is imported"
            raise ValueError(f"backend='triton': x is on {x.device}; {needed}")
        if num_segments > _MAX_SEGMENTS:
            raise ValueError(f"backend='triton': at most {_MAX_SEGMENTS} segments, got {num_segments}")
    return backend


def in_channels_last(x: Tensor, residual: Tensor | None, site: str) -> tuple[Tensor, Tensor | None]:
    """`x` and the residual contiguous in channels_last and in one dtype; a copy of `x` is made with a warning.

    Args:
        x: [N, C, H, W] in any layout.
        residual: [N, C, H, W] in any layout and float dtype, or None.
        site: Name for the warning.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        if not x.is_meta and not torch.compiler.is_compiling():
            warnings.warn(
                f"{site}: x is not contiguous in channels_last and is copied; convert it before", stacklevel=3
            )
        x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return x, residual


def _check_images(x: Tensor, residual: Tensor | None) -> None:
    if x.dim() != 4 or x.dtype not in _FLOATS:
        raise ValueError(f"x: expected [N, C, H, W] in float64, 32, 16 or bfloat16, got {tuple(x.shape)} {x.dtype}")
    if residual is None:
        return
    if residual.shape != x.shape or residual.dtype not in _FLOATS:
        got = f"{tuple(residual.shape)} {residual.dtype}"
        raise ValueError(f"residual: expected floating point in the shape of x {tuple(x.shape)}, got {got}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected on {x.device} like x, got {residual.device}")


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(tensor.shape) != shape or 0 in shape:
        raise ValueError(f"{name}: expected shape {shape} with C={x.shape[1]}, got {tuple(tensor.shape)}")
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name}: expected floating point, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like x, got {tensor.device}")


def _check_index(name: str, index: Tensor, limit: int, x: Tensor) -> None:
    if tuple(index.shape) != (len(x),) or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected [{len(x)}] int32 or int64, got {tuple(index.shape)} {index.dtype}")
    if index.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like x, got {index.device}")
    # A GPU would have to be waited for, and a traced value is not there to be looked at.
    if index.is_cpu and len(index) and not torch.compiler.is_compiling():
        low, high = (int(t) for t in index.aminmax())
        if not 0 <= low <= high < limit:
            raise ValueError(f"{name}: expected values in [0, {limit}), got {low} to {high}")
