"""`torch.ops.oat`: the operators as `torch.compile` and `torch.export` see them.

Schema, shapes without values (fake tensors) and autograd formulas; what runs is `kernels.operators`. An operator may
return neither None nor its own input, so gradients that are not wanted come back as empty tensors here and are put
right in the autograd formula.
"""

import torch
from torch import Tensor

from kernels import operators
from kernels.torch_backend import accumulator


@torch.library.custom_op("oat::film_dual_bn", mutates_args=())
def film_dual_bn(
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
    """A training site: (y [N, C, H, W], mean [S, C], var [S, C], count [S]); running statistics are the caller's."""
    return operators._site_forward(
        x, weight, bias, film_scale, film_shift, residual, segment, film_row, groups, relu, eps, sync, backend
    )


@film_dual_bn.register_fake
def _(x, weight, bias, film_scale, film_shift, residual, segment, film_row, groups, relu, eps, sync, backend):
    acc, shape = accumulator(x.dtype), (len(groups), x.shape[1])
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, x.new_empty(shape, dtype=acc), x.new_empty(shape, dtype=acc), x.new_empty(shape[:1], dtype=acc)


@torch.library.custom_op("oat::film_dual_bn_backward", mutates_args=())
def film_dual_bn_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, film_scale, film_shift, residual; empty where there is none."""
    grads = operators._site_backward(
        dy, y, x, weight, bias, film_scale, mean, var, count, segment, film_row, groups, eps, sync, want_residual,
        backend,
    )  # fmt: skip
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@film_dual_bn_backward.register_fake
def _(dy, y, x, weight, bias, film_scale, mean, var, count, segment, film_row, groups, eps, sync, want, backend):
    films = [x.new_empty(0) if film_scale is None else torch.empty_like(film_scale) for _ in range(2)]
    dz = torch.empty_like(dy, memory_format=torch.channels_last) if want and y is not None else x.new_empty(0)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(weight), torch.empty_like(bias), *films, dz


film_dual_bn.register_autograd(
    lambda ctx, dy, *_: operators._site_gradients(ctx, dy, film_dual_bn_backward),
    setup_context=operators._save_site,
)


@torch.library.custom_op("oat::modulate", mutates_args=())
def modulate(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, row: Tensor, relu: bool, backend: str
) -> Tensor:
    """A site whose statistics are constants."""
    return operators._modulate_forward(x, scale, shift, residual, row, relu, backend)


@modulate.register_fake
def _(x, scale, shift, residual, row, relu, backend):
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op("oat::modulate_backward", mutates_args=())
def modulate_backward(
    dy: Tensor, y: Tensor | None, x: Tensor | None, scale: Tensor, row: Tensor, want_residual: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, shift, residual; empty where there is none."""
    grads = operators._modulate_backward(dy, y, x, scale, row, want_residual, backend)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@modulate_backward.register_fake
def _(dy, y, x, scale, row, want_residual, backend):
    affine = [dy.new_empty(0) if x is None else torch.empty_like(scale) for _ in range(2)]
    has_dz = want_residual and y is not None
    dz = torch.empty_like(dy, memory_format=torch.channels_last) if has_dz else dy.new_empty(0)
    return torch.empty_like(dy, memory_format=torch.channels_last), *affine, dz


modulate.register_autograd(
    lambda ctx, dy: operators._modulate_gradients(ctx, dy, modulate_backward),
    setup_context=lambda ctx, inputs, output: operators._save_modulate(ctx, inputs, output),
)


@torch.library.custom_op("oat::update_running", mutates_args=("running_mean", "running_var"))
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    groups: list[int],
    momentum: float,
    backend: str,
) -> None:
    """Move the running statistics in place, segment after segment."""
    operators.passes(backend).update_running(running_mean, running_var, count, mean, var, tuple(groups), momentum)


@update_running.register_fake
def _(running_mean, running_var, count, mean, var, groups, momentum, backend):
    return None
