"""The Triton backward passes equal plain float64 formulas: all sums, gradients of the input, gradients of modulate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import triton_backend
from kernels.backward import _merge_grads
from kernels.tiling import Plan
from tests.numerics import assert_as_good_as_plain

GROUPS = (0, 1, 1)
NAMES = ("d_weight", "d_bias", "d_scale", "d_shift", "sum_u", "sum_u_xhat", "dx", "d_residual")
# Several tiles in every direction and two units per image even for the smallest images.
SMALL = Plan(rows=4, channels=4, fold=2, parts=2)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def site(seed: int, segment: list[int], shape: tuple[int, int, int], dtype=torch.float64, **options) -> dict:
    """Arguments of both passes; y has zeros, as below a ReLU."""
    num, channels, film = len(segment), shape[0], options.pop("film", True)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    small = [normal(seed + i, rows, channels, dtype=acc) for i, rows in enumerate((2, 2, 3, 3, 3, 3, 4))]
    index = options.pop("index", torch.int64)
    return {
        "dy": normal(seed + 10, num, *shape, dtype=dtype),
        "y": torch.relu(normal(seed + 11, num, *shape, dtype=dtype)),
        "x": normal(seed + 12, num, *shape, dtype=dtype),
        "weight_GC": small[0],
        "bias_GC": small[1],
        "mean_SC": small[2],
        "var_SC": small[3].square() + 0.1,
        "m1_SC": small[4],
        "m2_SC": small[5],
        "segment_N": torch.tensor(segment, dtype=index),
        "groups": GROUPS,
        "film_scale_LC": small[6] if film else None,
        "film_row_N": torch.arange(num, dtype=index) * 3 % 4 if film else None,
        "relu": True,
        "eps": 1e-5,
    } | options


def ours(args: dict, *, want_residual: bool = True, plan: Plan | None = None) -> tuple[Tensor | None, ...]:
    """Both passes, in the order of NAMES."""
    first = {k: v for k, v in args.items() if k not in ("m1_SC", "m2_SC")}
    second = {k: v for k, v in args.items() if k != "bias_GC"}
    sums = triton_backend.reduce_grads(**first, plan=plan)
    return *sums, *triton_backend.input_grad(**second, want_residual=want_residual, plan=plan)


def formulas(args: dict) -> tuple[Tensor | None, ...]:
    """The same written out, in the dtype of x."""
    dtype, film = args["x"].dtype, args["film_row_N"] is not None
    a = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
    segment, groups = a["segment_N"].long(), torch.tensor(a["groups"], device=a["x"].device)
    group = groups[segment]
    of_image = (slice(None), slice(None), None, None)
    dz = torch.where(a["y"] <= 0, 0, a["dy"]) if a["relu"] else a["dy"]
    rstd = 1 / torch.sqrt(a["var_SC"] + a["eps"])[segment][of_image]
    xhat = (a["x"] - a["mean_SC"][segment][of_image]) * rstd
    weight, bias = a["weight_GC"][group][of_image], a["bias_GC"][group][of_image]
    u = dz * a["film_scale_LC"][a["film_row_N"].long()][of_image] if film else dz

    def summed(values: Tensor, index: Tensor, rows: int) -> Tensor:
        per_image = values.sum((2, 3))
        return torch.stack([per_image[index == row].sum(0) for row in range(rows)])

    d_scale = d_shift = None
    if film:
        row = a["film_row_N"].long()
        d_scale, d_shift = summed(dz * (weight * xhat + bias), row, 4), summed(dz, row, 4)
    sums = summed(u * xhat, group, 2), summed(u, group, 2), d_scale, d_shift
    dx = weight * rstd * (u - a["m1_SC"][segment][of_image] - xhat * a["m2_SC"][segment][of_image])
    return *sums, summed(u, segment, 3), summed(u * xhat, segment, 3), dx, dz


def assert_equal(args: dict, plan: Plan | None = None, tolerance: float = 1e-10) -> None:
    for name, a, b in zip(NAMES, ours(args, plan=plan), formulas(args), strict=True):
        if b is None:
            assert a is None, name
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


SHAPES = {
    "channels no power of two": ([0, 1, 1, 2], (6, 3, 4)),
    "one pixel": ([0, 1, 2, 2, 1], (5, 1, 1)),
    "one image": ([1], (3, 5, 5)),
    "one channel": ([0, 0, 2], (1, 3, 3)),
    "unsorted segments": ([2, 0, 1, 2, 0], (17, 3, 3)),
}


@pytest.mark.parametrize("plan", [None, SMALL], ids=["own plan", "small tiles"])
@pytest.mark.parametrize(("segment", "shape"), SHAPES.values(), ids=SHAPES)
def test_all_gradients_equal_the_formulas(segment, shape, plan):
    assert_equal(site(0, segment, shape), plan)


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_all_gradients_equal_the_formulas_with_every_option(film, relu, index):
    args = site(1, [0, 2, 1], (6, 2, 3), film=film, relu=relu, index=index)
    if not relu:
        args["y"] = None
    assert_equal(args)
    assert ours(args, want_residual=False)[-1] is None


@given(
    segment=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    rows=st.sampled_from([1, 4, 8]),
    width=st.sampled_from([4, 16]),
    film=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_all_gradients_equal_the_formulas_for_any_shape_and_tile(segment, shape, rows, width, film, relu, seed):
    plan = Plan(rows=rows, channels=width, fold=min(2, rows), parts=1 + seed % 3)
    assert_equal(site(seed, segment, shape, film=film, relu=relu), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_as_good_as_plain_pytorch_in_the_same_dtype(dtype):
    args = site(2, [0, 1, 2, 2], (6, 3, 3), dtype)
    double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
    for name, a, plain, exact in zip(NAMES, ours(args), formulas(args), formulas(double), strict=True):
        assert a.dtype == (dtype if name in ("dx", "d_residual") else torch.float32), name
        assert_as_good_as_plain(a, plain, exact, name)


def test_one_value_alone_gets_exactly_no_gradient():
    args = site(3, [0, 1], (5, 1, 1), torch.float32)
    args |= {"mean_SC": torch.stack((args["x"][0, :, 0, 0], args["x"][1, :, 0, 0], args["mean_SC"][2]))}
    args |= {"var_SC": torch.zeros(3, 5)}
    *_, sum_u, sum_u_xhat, _, _ = ours(args)
    args |= {"m1_SC": sum_u, "m2_SC": sum_u_xhat}
    assert torch.equal(ours(args)[-2], torch.zeros_like(args["x"]))


def test_sums_over_many_units_take_several_turns():
    splits, (s1, s2), row = 2, normal(4, 2, 600, 3), torch.arange(300) * 7 % 4
    d_scale, d_shift = torch.empty(4, 3, dtype=torch.float64), torch.empty(4, 3, dtype=torch.float64)
    sums = (None, None, d_scale, d_shift, None, None)
    _merge_grads(s1, s2, splits, (None, None, None), None, row, sums, groups=())
    unit_row = row.repeat_interleave(splits)
    for ours_LC, values in ((d_shift, s1), (d_scale, s2)):
        expected = torch.stack([values[unit_row == line].sum(0) for line in range(4)])
        torch.testing.assert_close(ours_LC, expected, rtol=1e-10, atol=1e-10)


def test_not_a_number_in_the_output_lets_the_gradient_through():
    args = site(5, [0, 1, 2], (3, 2, 2))
    args["y"][0, 1, 0, 0] = float("nan")
    assert ours(args)[-1][0, 1, 0, 0] == args["dy"][0, 1, 0, 0]


def test_two_runs_are_bit_identical():
    args = site(6, [0, 1, 2, 1], (5, 3, 3), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours(args, plan=SMALL), ours(args, plan=SMALL), strict=True))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("want_residual", [True, False])
@pytest.mark.parametrize("want_affine", [True, False])
def test_gradients_of_modulate_equal_the_formulas(relu, want_residual, want_affine):
    dy, y, x = normal(1, 3, 6, 2, 3), torch.relu(normal(2, 3, 6, 2, 3)), normal(3, 3, 6, 2, 3)
    scale, row = normal(4, 4, 6), torch.tensor([3, 0, 3], dtype=torch.int32)
    dz = torch.where(y <= 0, 0, dy) if relu else dy
    of_row = [[i for i, r in enumerate(row.tolist()) if r == line] for line in range(4)]
    expected = (
        scale[row.long()][:, :, None, None] * dz,
        torch.stack([(dz * x)[i].sum((0, 2, 3)) for i in of_row]) if want_affine else None,
        torch.stack([dz[i].sum((0, 2, 3)) for i in of_row]) if want_affine else None,
        dz if want_residual else None,
    )
    options = {"relu": relu, "want_affine": want_affine, "want_residual": want_residual}
    for plan in (None, SMALL):
        got = triton_backend.modulate_grads(
            dy, y if relu else None, x if want_affine else None, scale, row, **options, plan=plan
        )
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_no_images_give_empty_gradients_and_zero_sums():
    *sums, dx, d_residual = ours(site(7, [], (3, 2, 2)))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in sums)
    assert dx.shape == d_residual.shape == (0, 3, 2, 2)
    dy, scale = normal(0, 0, 3, 2, 2), normal(1, 4, 3)
    options = {"relu": False, "want_affine": True, "want_residual": False}
    dx, d_scale, _, _ = triton_backend.modulate_grads(dy, None, dy, scale, torch.zeros(0, dtype=torch.int64), **options)
    assert dx.shape == dy.shape and torch.equal(d_scale, torch.zeros_like(scale))


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "side"), [(64, 32), (128, 16), (256, 8), (512, 4)])
def test_backward_at_real_shapes_on_a_gpu_repeats_bit_for_bit_and_is_captured_in_a_graph(channels, side):
    args = site(8, [0] * 20 + [1] * 40 + [2] * 36, (channels, side, side), torch.bfloat16)
    args = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in args.items()}
    first = ours(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(args)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
    double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
    for name, a, plain, exact in zip(NAMES, first, formulas(args), formulas(double), strict=True):
        assert_as_good_as_plain(a, plain, exact, name)
