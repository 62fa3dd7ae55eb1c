"""The kernels as a GPU runs them, compiled and not interpreted, equal the definition; the interpreter hides much."""

import pytest
import torch
from torch import Tensor

from kernels import film_dual_bn, film_dual_bn_reference, modulate
from tests.numerics import EPS, assert_as_good_as_plain, copy_of, leaves, site_inputs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SEGMENTS = [0, 0, 1, 1, 1, 2, 2, 2]
# Integers that Triton treats apart (1, multiples of 16), tiles that are not full, several tiles and blocks of channels.
SITES = {
    "one value": {"segments": [0], "channels": 1, "height": 1, "width": 1},
    "one image": {"segments": [1], "channels": 3, "height": 5, "width": 4},
    "one pixel": {"segments": SEGMENTS, "channels": 80, "height": 1, "width": 1},
    "odd": {"segments": SEGMENTS, "channels": 5, "height": 3, "width": 7},
    "empty segments": {"segments": [1] * 5, "channels": 24, "height": 6, "width": 6},
    "mixed order": {"segments": [2, 0, 1, 2, 0, 1, 1], "channels": 64, "height": 16, "width": 16},
    "many channels": {"segments": SEGMENTS, "channels": 640, "height": 4, "width": 4},
    "many pixels": {"segments": SEGMENTS, "channels": 16, "height": 96, "width": 96},
    "one group": {"segments": SEGMENTS, "channels": 32, "height": 8, "width": 8, "groups": 1},
    "no FiLM": {"segments": SEGMENTS, "channels": 32, "height": 8, "width": 8, "film": False},
    "no residual": {"segments": SEGMENTS, "channels": 32, "height": 8, "width": 8, "residual": False},
}


def moved(args: dict, device: str) -> dict:
    """Independent copies on a device."""
    return {
        name: t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for name, t in copy_of(args).items()
    }


def run(fn, args: dict, **options) -> dict[str, Tensor]:
    """Output, gradients of a fixed weighting, and running statistics, on the host."""
    y = fn(**args, **options)
    gen = torch.Generator().manual_seed(9)
    upstream = torch.randn(y.shape, generator=gen, dtype=torch.float64).to(y.device, y.dtype)
    grads = torch.autograd.grad(y, list(leaves(args).values()), upstream)
    found = {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves(args), grads, strict=True)}
    return {name: t.cpu() for name, t in (found | {k: args[k] for k in ("running_mean", "running_var")}).items()}


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_in_float64_everything_equals_the_definition(site, training, relu):
    args, options = site_inputs(**site), {"training": training, "relu": relu, "eps": 1e-2}
    got = run(film_dual_bn, moved(args, DEVICE), backend="triton", **options)
    expected = run(film_dual_bn_reference, copy_of(args), **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("site", ["odd", "mixed order", "many channels"])
def test_precision_is_as_good_as_plain_pytorch_in_the_same_dtype(site, dtype):
    args = site_inputs(**SITES[site], dtype=dtype, mean=3.0)
    got = run(film_dual_bn, moved(args, DEVICE), backend="triton", relu=False)
    plain = run(lambda **kw: film_dual_bn_reference(**kw, upcast=False), moved(args, DEVICE), relu=False)
    exact = run(film_dual_bn_reference, copy_of(args, torch.float64), relu=False)
    for name, value in exact.items():
        if not name.startswith("running"):  # kept in the dtype of the arguments, which networks have in float32
            assert_as_good_as_plain(got[name], plain[name], value, name)


@pytest.mark.parametrize("site", ["odd", "mixed order"])
def test_images_in_bfloat16_with_parameters_and_statistics_in_float32_equal_the_definition(site):
    args = site_inputs(**SITES[site], dtype=torch.float32)
    for name in ("x", "residual"):
        args[name] = args[name].detach().bfloat16().requires_grad_(True)
    got = run(film_dual_bn, moved(args, DEVICE), backend="triton")
    expected = run(film_dual_bn_reference, copy_of(args, torch.float64))
    for name, value in expected.items():
        assert (got[name].double() - value).abs().max() <= 2**-6 * value.abs().max(), name


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("site", ["one value", "odd", "many channels", "many pixels"])
def test_modulate_and_its_gradients_equal_the_formula(site, index, relu):
    args = site_inputs(**SITES[site])
    on_device = moved(args, DEVICE)
    scale, shift, residual, x = (on_device[name] for name in ("film_scale", "film_shift", "residual", "x"))
    row = on_device["film_row"].to(index)
    y = modulate(x, scale, shift, row, residual=residual, relu=relu, backend="triton")
    of_image = (slice(None), slice(None), None, None)
    expected = scale[row.long()][of_image] * x + shift[row.long()][of_image] + residual
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, scale, shift, residual)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, x.detach()), torch.autograd.grad(expected, inputs, x.detach()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_of_gradients_pass_gradgradcheck():
    args = moved(site_inputs(segments=[0, 0, 1, 1, 2, 2], channels=2, height=2, width=2), DEVICE)
    names = list(leaves(args))

    def fn(*values: Tensor) -> Tensor:
        fresh = {**args, **dict(zip(names, values, strict=True))}
        fresh |= {key: args[key].clone() for key in ("running_mean", "running_var")}
        return film_dual_bn(**fresh, relu=False, backend="triton")

    values = tuple(args[name] for name in names)
    # Atomics of torch's own index operations change the last bits.
    assert torch.autograd.gradcheck(fn, values, fast_mode=True, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(fn, values, fast_mode=True, nondet_tol=1e-12)


def test_images_beyond_the_reach_of_32_bits_are_normalised_like_any_other():
    channels, side = 64, 96
    num = 2**31 // (channels * side * side) + 2
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    gen = torch.Generator(DEVICE).manual_seed(0)
    alone, dy = (torch.zeros(num, side, side, channels, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for images in (alone, dy):
        images[-1].normal_(generator=gen)
    x, dy = alone.permute(0, 3, 1, 2).requires_grad_(True), dy.permute(0, 3, 1, 2)
    weight = torch.ones(2, channels, device=DEVICE)
    bias, mean, var = torch.zeros_like(weight), torch.zeros_like(weight), torch.ones_like(weight)
    segment = (torch.arange(num, device=DEVICE) == num - 1).int()
    y = film_dual_bn(x, weight, bias, mean, var, segment=segment, group_of_segment=(0, 1), relu=False)
    (grad,) = torch.autograd.grad(y, x, dy)
    last = x.detach()[-1:].float().requires_grad_(True)
    expected = torch.nn.functional.batch_norm(last, None, None, training=True)
    (expected_grad,) = torch.autograd.grad(expected, last, dy[-1:].float())
    torch.testing.assert_close(y[-1:].float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grad[-1:].float(), expected_grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mean[1], 0.1 * last.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
