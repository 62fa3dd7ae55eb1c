"""The Triton forward passes equal plain float64 formulas: statistics, apply, modulate, running statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import triton_backend
from kernels.tiling import MAX_SEGMENTS, Plan
from tests.numerics import assert_as_good_as_plain

GROUPS = (0, 1, 1)
# Several tiles in every direction and several partial rows even for the smallest images.
SMALL = Plan(rows=4, channels=4, fold=2, parts=3)


def images(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
    )


def table(seed: int, rows: int, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected_statistics(x: Tensor, segment: list[int], num_segments: int) -> tuple[Tensor, Tensor, Tensor]:
    x, index = x.double(), torch.tensor(segment)
    parts = [x[index == s].permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for s in range(num_segments)]
    count = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
    mean = torch.stack([part.sum(0) / max(1, len(part)) for part in parts])
    m2 = torch.stack([(part - m).square().sum(0) for part, m in zip(parts, mean, strict=True)])
    return count, mean, m2


def assert_statistics(x: Tensor, segment: list[int], num_segments: int = 3, *, plan=None, dtype=torch.int64, tol=1e-10):
    ours = triton_backend.segment_statistics(x, torch.tensor(segment, dtype=dtype), num_segments, plan=plan)
    for a, b in zip(ours, expected_statistics(x, segment, num_segments), strict=True):
        assert a.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol)


def expected_apply(args: dict) -> Tensor:
    """The formula, image by image; in the dtype of x."""
    rows, groups, film = [], args["groups"], args["film_row_N"] is not None
    for i, s in enumerate(args["segment_N"].tolist()):
        g, dtype = groups[s], args["x"].dtype
        per_channel = {"w": args["weight_GC"][g], "b": args["bias_GC"][g], "mean": args["mean_SC"][s]}
        per_channel["std"] = torch.sqrt(args["var_SC"][s] + args["eps"])
        if film:
            row = args["film_row_N"][i]
            per_channel |= {"scale": args["film_scale_LC"][row], "shift": args["film_shift_LC"][row]}
        v = {name: t[:, None, None].to(dtype) for name, t in per_channel.items()}
        z = v["w"] * (args["x"][i] - v["mean"]) / v["std"] + v["b"]
        if film:
            z = v["scale"] * z + v["shift"]
        if args["residual"] is not None:
            z = z + args["residual"][i]
        rows.append(torch.relu(z) if args["relu"] else z)
    return torch.stack(rows)


def apply_args(seed: int, segment: list[int], shape: tuple[int, int, int], dtype=torch.float64, **options) -> dict:
    channels, film = shape[0], options.pop("film", True)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    args = {
        "x": images(seed, len(segment), *shape, dtype=dtype),
        "weight_GC": table(seed + 1, 2, channels, acc),
        "bias_GC": table(seed + 2, 2, channels, acc),
        "mean_SC": table(seed + 3, 3, channels, acc),
        "var_SC": table(seed + 4, 3, channels, acc).square(),
        "segment_N": torch.tensor(segment, dtype=options.pop("index", torch.int64)),
        "groups": GROUPS,
        "film_scale_LC": table(seed + 5, 4, channels, acc) if film else None,
        "film_shift_LC": table(seed + 6, 4, channels, acc) if film else None,
        "film_row_N": torch.arange(len(segment), dtype=torch.int32) % 4 if film else None,
        "residual": images(seed + 7, len(segment), *shape, dtype=dtype) if options.pop("residual", True) else None,
    }
    return args | {"relu": True, "eps": 1e-5} | options


def doubled(args: dict, dtype: torch.dtype = torch.float64) -> dict:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}


SHAPES = {
    "channels no power of two": ([0, 1, 1, 2], (6, 3, 4)),
    "one pixel": ([0, 1, 2, 2, 1], (5, 1, 1)),
    "one image": ([1], (3, 5, 5)),
    "one channel": ([0, 0, 2], (1, 3, 3)),
    "unsorted segments": ([2, 0, 1, 2, 0], (9, 3, 3)),
}


@pytest.mark.parametrize("plan", [None, SMALL], ids=["own plan", "small tiles"])
@pytest.mark.parametrize(("segment", "shape"), SHAPES.values(), ids=SHAPES)
def test_statistics_and_apply_equal_the_formulas(segment, shape, plan):
    args = apply_args(0, segment, shape)
    assert_statistics(args["x"], segment, plan=plan)
    torch.testing.assert_close(triton_backend.apply(**args, plan=plan), expected_apply(args), rtol=1e-10, atol=1e-10)


@given(
    segment=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    rows=st.sampled_from([1, 4, 8]),
    width=st.sampled_from([4, 16]),
    parts=st.integers(1, 4),
    film=st.booleans(),
    residual=st.booleans(),
    relu=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 100),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_statistics_and_apply_equal_the_formulas_for_any_shape_and_tile(
    segment, shape, rows, width, parts, film, residual, relu, index, seed
):
    plan = Plan(rows=rows, channels=width, fold=min(2, rows), parts=parts)
    args = apply_args(seed, segment, shape, film=film, residual=residual, relu=relu, index=index)
    assert_statistics(args["x"], segment, plan=plan, dtype=index)
    torch.testing.assert_close(triton_backend.apply(**args, plan=plan), expected_apply(args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_apply_and_modulate_equal_the_formulas_with_every_option(film, residual, relu):
    args = apply_args(1, [0, 2, 1], (6, 2, 3), film=film, residual=residual, relu=relu)
    torch.testing.assert_close(triton_backend.apply(**args), expected_apply(args), rtol=1e-10, atol=1e-10)
    x, row = args["x"], torch.tensor([3, 0, 3])
    scale, shift = table(8, 4, 6), table(9, 4, 6)
    z = scale[row][:, :, None, None] * x + shift[row][:, :, None, None]
    z = z if args["residual"] is None else z + args["residual"]
    y = triton_backend.modulate(x, scale, shift, row, residual=args["residual"], relu=relu, plan=SMALL)
    torch.testing.assert_close(y, torch.relu(z) if relu else z, rtol=1e-10, atol=1e-10)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_as_good_as_plain_pytorch_in_the_same_dtype(dtype):
    args = apply_args(2, [0, 1, 2, 2], (6, 3, 3), dtype)
    y, plain, exact = triton_backend.apply(**args), expected_apply(args), expected_apply(doubled(args))
    assert y.dtype == dtype
    assert_as_good_as_plain(y, plain, exact, "apply")
    x, scale, shift, row = args["x"], args["film_scale_LC"], args["film_shift_LC"], args["film_row_N"]
    y = triton_backend.modulate(x, scale, shift, row, residual=args["residual"], relu=False)
    at = (row.long(), slice(None), None, None)
    plain = scale[at].to(dtype) * x + shift[at].to(dtype) + args["residual"]
    exact = scale[at].double() * x.double() + shift[at].double() + args["residual"].double()
    assert_as_good_as_plain(y, plain, exact, "modulate")
    assert_statistics(x, [0, 1, 2, 2], plan=SMALL, tol=1e-5)


def test_a_mean_a_million_times_the_spread_does_not_cancel():
    x = (1e4 + 0.01 * images(3, 6, 5, 4, 4)).float()
    segment = [0, 1, 1, 0, 1, 2]
    _, mean, m2 = triton_backend.segment_statistics(x, torch.tensor(segment), 3, plan=SMALL)
    _, expected_mean, expected_m2 = expected_statistics(x, segment, 3)
    # A unit in the last place of a mean is a tenth of the spread, its square a hundredth of the variance, and several
    # means are merged; E[x^2] - E[x]^2 would be off by thousands of times the variance.
    torch.testing.assert_close(mean.double(), expected_mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(m2.double(), expected_m2, rtol=5e-2, atol=0)


def test_an_outlier_as_the_first_pixel_does_not_spoil_the_statistics():
    x = images(4, 4, 3, 4, 4, dtype=torch.float32)
    x[0, :, 0, 0] = 1e3
    assert_statistics(x, [0, 0, 1, 1], plan=SMALL, tol=1e-5)


def test_zero_variance_gives_zero():
    x = torch.full((4, 3, 3, 3), 0.1).contiguous(memory_format=torch.channels_last)
    x[2:] = 7.3
    _, mean, m2 = triton_backend.segment_statistics(x, torch.tensor([0, 0, 1, 1]), 2, plan=SMALL)
    assert (m2 >= 0).all() and m2.max() < 1e-10
    torch.testing.assert_close(mean, torch.tensor([[0.1] * 3, [7.3] * 3]))


def test_not_a_number_stays_in_its_segment_and_passes_the_relu():
    x = images(5, 4, 3, 2, 2)
    x[0, 1, 0, 0] = float("nan")
    segment = torch.tensor([0, 1, 1, 2])
    _, mean, m2 = triton_backend.segment_statistics(x, segment, 3, plan=SMALL)
    assert torch.isnan(mean).nonzero().tolist() == torch.isnan(m2).nonzero().tolist() == [[0, 1]]
    scale = table(0, 1, 3)
    y = triton_backend.modulate(x, scale, scale, torch.zeros_like(segment), residual=None, relu=True)
    assert torch.isnan(y).nonzero().tolist() == [[0, 1, 0, 0]]


def test_two_runs_are_bit_identical():
    args = apply_args(6, [0, 1, 2, 1, 0, 2], (5, 3, 3), torch.float32)
    first, second = (
        (*triton_backend.segment_statistics(args["x"], args["segment_N"], 3, plan=SMALL), triton_backend.apply(**args))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("counts", "groups"), [([12, 1, 0], (0, 1, 1)), ([5, 6, 7], (1, 0, 1)), ([0, 1, 4], (0, 0, 0))]
)
def test_running_statistics_move_segment_after_segment(counts, groups):
    momentum, channels, count = 0.3, 130, torch.tensor(counts, dtype=torch.float64)
    mean, var = table(0, 3, channels), table(1, 3, channels).square()
    running_mean, running_var = table(2, 2, channels), table(3, 2, channels).square()
    expected_mean, expected_var = running_mean.clone(), running_var.clone()
    for s, g in enumerate(groups):
        if counts[s] > 0:
            expected_mean[g] += momentum * (mean[s] - expected_mean[g])
        if counts[s] > 1:
            expected_var[g] += momentum * (var[s] * counts[s] / (counts[s] - 1) - expected_var[g])
    triton_backend.update_running(running_mean, running_var, count, mean, var, groups, momentum)
    torch.testing.assert_close(running_mean, expected_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(running_var, expected_var, rtol=1e-12, atol=1e-12)


def test_as_many_segments_as_can_be_packed_keep_their_groups():
    segment, groups = list(range(MAX_SEGMENTS)), (7, 0, 6, 1, 5, 2, 4, 3)
    args = apply_args(7, [0] * MAX_SEGMENTS, (2, 1, 1), residual=False)
    args |= {"segment_N": torch.tensor(segment), "groups": groups}
    args |= {"weight_GC": table(1, 8, 2), "bias_GC": table(2, 8, 2)}
    args |= {"mean_SC": table(3, 8, 2), "var_SC": table(4, 8, 2).square()}
    torch.testing.assert_close(triton_backend.apply(**args), expected_apply(args), rtol=1e-10, atol=1e-10)
    assert_statistics(args["x"], segment, MAX_SEGMENTS)


def test_no_images_give_empty_results():
    args = apply_args(8, [], (3, 2, 2))
    assert triton_backend.apply(**args).shape == args["x"].shape
    statistics = triton_backend.segment_statistics(args["x"], args["segment_N"], 3)
    assert [t.shape for t in statistics] == [(3,), (3, 3), (3, 3)]
    assert all(torch.equal(t, torch.zeros_like(t)) for t in statistics)
    y = triton_backend.modulate(args["x"], table(0, 4, 3), table(1, 4, 3), args["film_row_N"], residual=None, relu=True)
    assert y.shape == args["x"].shape


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "side"), [(64, 32), (128, 16), (256, 8), (512, 4)])
def test_forward_at_real_shapes_on_a_gpu_repeats_bit_for_bit_and_is_captured_in_a_graph(channels, side):
    args = apply_args(9, [0] * 20 + [1] * 40 + [2] * 36, (channels, side, side), torch.bfloat16)
    args = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in args.items()}

    def forward() -> tuple[Tensor, ...]:
        return (*triton_backend.segment_statistics(args["x"], args["segment_N"], 3), triton_backend.apply(**args))

    first = forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
    exact = expected_statistics(args["x"].cpu(), args["segment_N"].tolist(), 3)
    for ours, theirs in zip(first[:3], exact, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-4)
    exact = expected_apply(doubled(args))
    assert_as_good_as_plain(first[3], expected_apply(args), exact, "apply")
