"""The frozen operator equals scale, shift, add and ReLU written out."""

import pytest
import torch

from kernels import film_dual_bn, modulate
from tests.numerics import assert_as_good_as_plain, copy_of, site_inputs


def inputs(dtype: torch.dtype = torch.float64) -> dict:
    gen = torch.Generator().manual_seed(3)

    def images() -> torch.Tensor:
        value = torch.randn(5, 4, 3, 2, generator=gen, dtype=torch.float64).to(dtype)
        return value.contiguous(memory_format=torch.channels_last).requires_grad_(True)

    return {
        "x": images(),
        "scale": torch.randn(3, 4, generator=gen, dtype=torch.float64).to(dtype).requires_grad_(True),
        "shift": torch.randn(3, 4, generator=gen, dtype=torch.float64).to(dtype).requires_grad_(True),
        "row": torch.tensor([2, 0, 1, 1, 0]),
        "residual": images(),
    }


def written_out(x, scale, shift, row, residual, relu):
    y = scale[row][:, :, None, None] * x + shift[row][:, :, None, None]
    y = y if residual is None else y + residual
    return y.clamp(min=0) if relu else y


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_modulate_equals_the_formula_with_gradients(relu, has_residual, backend):
    args, other = inputs(), inputs()
    if not has_residual:
        args["residual"] = other["residual"] = None
    y, expected = modulate(**args, relu=relu, backend=backend), written_out(**other, relu=relu)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    wanted = ("x", "scale", "shift", "residual") if has_residual else ("x", "scale", "shift")
    for name, ours, theirs in zip(
        wanted,
        torch.autograd.grad(y.square().sum(), [args[n] for n in wanted]),
        torch.autograd.grad(expected.square().sum(), [other[n] for n in wanted]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_precision_is_as_good_as_plain_pytorch_in_the_same_dtype(dtype, backend):
    args = inputs(dtype)
    exact = written_out(**copy_of(args, torch.float64), relu=True)
    assert_as_good_as_plain(modulate(**args, backend=backend), written_out(**args, relu=True), exact, "y")


def test_modulate_with_folded_statistics_equals_the_site_in_evaluation():
    args = site_inputs(segments=[0, 1, 1, 0])
    y = film_dual_bn(**args, training=False)
    group = torch.tensor([0, 1, 1])[args["segment"]]
    a = args["weight"] / torch.sqrt(args["running_var"] + 1e-5)
    b = args["bias"] - args["running_mean"] * a
    scale, shift = args["film_scale"][args["film_row"]], args["film_shift"][args["film_row"]]
    folded = modulate(args["x"], scale * a[group], scale * b[group] + shift, torch.arange(4), residual=args["residual"])
    torch.testing.assert_close(folded, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "value"),
    [("x", torch.zeros(5, 4)), ("scale", torch.zeros(3, 5)), ("shift", torch.zeros(2, 4)), ("row", torch.zeros(5)),
     ("residual", torch.zeros(5, 4, 3, 3)), ("backend", "cuda")],
)  # fmt: skip
def test_a_wrong_argument_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}"):
        modulate(**{**inputs(), name: value})
