"""The operators between checks and passes: autograd, and registration under `torch.ops.oat`.

Eager code runs the `torch.autograd.Function`s here; `torch.compile` and `torch.export` see the registered operators,
which run the same code but cost about 0.1 ms a call more. Both are functional: they return the batch's statistics, and
the public wrapper moves the running ones. What is saved for the backward is x and y (only y where neither scale nor
shift wants a gradient), not intermediate results.

    y = act( FiLM( DualBN(x) ) + residual )                      film_dual_bn
    y = act( scale[row] * x + shift[row] + residual )            modulate

Letters: N images, C channels, G norm groups, S segments, L distinct lambdas.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from kernels import differentiable
from kernels.collectives import merge_ranks, sum_over_ranks


def passes(backend: str) -> ModuleType:
    """The module with the passes of a backend, "torch" or "triton"; Triton is imported on first use."""
    return importlib.import_module(f"kernels.{backend}_backend")


# ---- a training site --------------------------------------------------------------------------------------------


def _site_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film_scale: Tensor | None,
    film_shift: Tensor | None,
    residual: Tensor | None,
    segment: Tensor,
    film_row: Tensor | None,
    groups: list[int],
    relu: bool,
    eps: float,
    sync: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = passes(backend)
    x = _channels_last(x)
    count_S, mean_SC, m2_SC = run.segment_statistics(x, segment, len(groups))
    if sync:
        count_S, mean_SC, m2_SC = merge_ranks(count_S, mean_SC, m2_SC)
    var_SC = m2_SC / count_S.clamp(min=1)[:, None]
    y = run.apply(
        x, weight, bias, mean_SC, var_SC, segment_N=segment, groups=tuple(groups), film_scale_LC=film_scale,
        film_shift_LC=film_shift, film_row_N=film_row, residual=_channels_last(residual), relu=relu, eps=eps,
    )  # fmt: skip
    return y, mean_SC, var_SC, count_S


def _site_backward(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film_scale: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    segment: Tensor,
    film_row: Tensor | None,
    groups: list[int],
    eps: float,
    sync: bool,
    want_residual: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, film_scale, film_shift and of the residual below a ReLU (dz)."""
    run, relu = passes(backend), y is not None
    dy, x = _channels_last(dy), _channels_last(x)
    shared = {
        "segment_N": segment, "groups": tuple(groups), "film_scale_LC": film_scale, "film_row_N": film_row,
        "relu": relu, "eps": eps,
    }  # fmt: skip
    d_weight, d_bias, d_scale, d_shift, *sums = run.reduce_grads(dy, y, x, weight, bias, mean, var, **shared)
    if sync:
        sums = sum_over_ranks(torch.stack(sums)).unbind()
    m1_SC, m2_SC = (t / count.clamp(min=1)[:, None] for t in sums)
    dx, dz = run.input_grad(dy, y, x, weight, mean, var, m1_SC, m2_SC, **shared, want_residual=want_residual and relu)
    d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(bias.dtype)
    if film_scale is not None:
        d_scale, d_shift = d_scale.to(film_scale.dtype), d_shift.to(film_scale.dtype)
    return dx, d_weight, d_bias, d_scale, d_shift, dz


def _save_site(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Keep for the backward: x, y and small tensors; the residual is not among them."""
    x, weight, bias, film_scale, film_shift, residual, segment, film_row = inputs[:8]
    ctx.groups, relu, ctx.eps, ctx.sync, ctx.backend = inputs[8:]
    y, mean, var, count = output
    ctx.mark_non_differentiable(mean, var, count)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(
        x, weight, bias, film_scale, film_shift, y if relu else None, mean, var, count, segment, film_row
    )


def _site_gradients(ctx, dy: Tensor, run) -> tuple[Tensor | None, ...]:
    """Gradients of the 13 arguments of a site by `run`, or with a graph where one is wanted."""
    x, weight, bias, film_scale, film_shift, y, mean, var, count, segment, film_row = ctx.saved_tensors
    if torch.is_grad_enabled():
        dz, grads = differentiable.site_grads(
            dy, y, (x, weight, bias, film_scale, film_shift),
            segment_N=segment, groups=ctx.groups, film_row_N=film_row, eps=ctx.eps, sync=ctx.sync,
        )  # fmt: skip
        grads.append(dz)
    else:
        grads = list(
            run(dy, y, x, weight, bias, film_scale, mean, var, count, segment, film_row, ctx.groups, ctx.eps, ctx.sync,
                ctx.has_residual, ctx.backend)
        )  # fmt: skip
        if film_scale is None:
            grads[3] = grads[4] = None
        if y is None:
            grads[5] = dy
    grads[5] = grads[5] if ctx.has_residual else None
    return *grads, *(None,) * 7


class FusedSite(torch.autograd.Function):
    """A training site in eager mode: `FusedSite.apply` takes the arguments of `_site_forward`."""

    @staticmethod
    def forward(ctx, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, mean_SC, var_SC, count_S)."""
        output = _site_forward(*args)
        _save_site(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx, dy: Tensor, *_) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias, FiLM and residual."""
        return _site_gradients(ctx, dy, _site_backward)


# ---- a site whose statistics are constants ----------------------------------------------------------------------


def _modulate_forward(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, row: Tensor, relu: bool, backend: str
) -> Tensor:
    return passes(backend).modulate(_channels_last(x), scale, shift, row, residual=_channels_last(residual), relu=relu)


def _modulate_backward(
    dy: Tensor, y: Tensor | None, x: Tensor | None, scale: Tensor, row: Tensor, want_residual: bool, backend: str
) -> tuple[Tensor | None, ...]:
    """Gradients of x, scale, shift (x is given exactly when these are wanted) and of the residual below a ReLU."""
    relu, want_affine = y is not None, x is not None
    dx, d_scale, d_shift, dz = passes(backend).modulate_grads(
        _channels_last(dy), y, _channels_last(x), scale, row,
        relu=relu, want_affine=want_affine, want_residual=want_residual and relu,
    )  # fmt: skip
    if want_affine:
        d_scale, d_shift = d_scale.to(scale.dtype), d_shift.to(scale.dtype)
    return dx, d_scale, d_shift, dz


def _save_modulate(ctx, inputs: tuple, output: Tensor) -> None:
    """Keep the sign of y alone when scale and shift are constants, as in attack steps."""
    x, scale, _, residual, row, relu, ctx.backend = inputs
    ctx.has_residual = residual is not None
    want_affine = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if want_affine else None, scale, output if relu else None, row)


def _modulate_gradients(ctx, dy: Tensor, run) -> tuple[Tensor | None, ...]:
    x, scale, y, row = ctx.saved_tensors
    if torch.is_grad_enabled():
        dz, dx, d_scale, d_shift = differentiable.modulate_grads(dy, y, x, scale, row)
    else:
        dx, d_scale, d_shift, dz = run(dy, y, x, scale, row, ctx.has_residual, ctx.backend)
        dz = dy if y is None else dz
    affine = (d_scale, d_shift) if x is not None else (None, None)
    return dx, *affine, dz if ctx.has_residual else None, None, None, None


class FusedModulate(torch.autograd.Function):
    """A frozen site in eager mode: `FusedModulate.apply` takes the arguments of `_modulate_forward`."""

    @staticmethod
    def forward(ctx, *args) -> Tensor:
        """The output."""
        y = _modulate_forward(*args)
        _save_modulate(ctx, args, y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, scale, shift and residual."""
        return _modulate_gradients(ctx, dy, _modulate_backward)


def _channels_last(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous(memory_format=torch.channels_last)
