"""The definition equals PyTorch's own modules, put together as the papers say."""

import pytest
import torch
from torch import nn

from kernels import film_dual_bn_reference
from tests.numerics import copy_of, leaves, site_inputs


def by_modules(args: dict, *, relu: bool, training: bool) -> tuple[torch.Tensor, list[nn.BatchNorm2d]]:
    """nn.BatchNorm2d per group called per segment in order, then FiLM, residual and ReLU."""
    x = args["x"]
    norms = []
    for g in range(len(args["weight"])):
        norm = nn.BatchNorm2d(x.shape[1], dtype=x.dtype).train(training)
        norm.weight, norm.bias = None, None
        norm.running_mean, norm.running_var = args["running_mean"][g].clone(), args["running_var"][g].clone()
        norms.append(norm)
    out = torch.zeros_like(x)
    for s, g in enumerate(args["group_of_segment"]):
        members = (args["segment"] == s).nonzero().flatten()
        if len(members):
            xhat = norms[g](x[members])
            out = out.index_copy(0, members, args["weight"][g][:, None, None] * xhat + args["bias"][g][:, None, None])
    if "film_scale" in args:
        row = args["film_row"]
        out = args["film_scale"][row][:, :, None, None] * out + args["film_shift"][row][:, :, None, None]
    if "residual" in args:
        out = out + args["residual"]
    return (torch.relu(out) if relu else out), norms


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_definition_equals_batch_norm_modules_film_residual_and_relu(training, relu, film, residual, groups):
    args = site_inputs(segments=[0, 1, 2, 1, 0, 2, 2, 1], groups=groups, film=film, residual=residual)
    other = copy_of(args)
    y = film_dual_bn_reference(**args, relu=relu, training=training)
    expected, norms = by_modules(other, relu=relu, training=training)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for name, stack in (
        ("running_mean", [n.running_mean for n in norms]),
        ("running_var", [n.running_var for n in norms]),
    ):
        torch.testing.assert_close(args[name], torch.stack(stack), rtol=1e-12, atol=1e-12, msg=name)

    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, leaf in leaves(args).items():
        torch.testing.assert_close(leaf.grad, other[name].grad, rtol=1e-10, atol=1e-10, msg=name)


def test_half_precision_is_computed_in_float32_unless_asked_otherwise():
    args = site_inputs(segments=[0, 0, 1, 1], dtype=torch.bfloat16, mean=30.0)
    exact = film_dual_bn_reference(**copy_of(args, torch.float64))
    upcast = film_dual_bn_reference(**copy_of(args))
    raw = film_dual_bn_reference(**copy_of(args), upcast=False)
    error, raw_error = ((y.double() - exact).abs().max() for y in (upcast, raw))
    assert upcast.dtype == torch.bfloat16
    assert error < 0.25 * raw_error
