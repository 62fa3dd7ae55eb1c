"""The operator equals its definition: values, all gradients, running statistics, precision, edges, repeatability."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import film_dual_bn, film_dual_bn_reference
from tests.numerics import assert_as_good_as_plain, copy_of, leaves, site_inputs

BACKENDS = ["torch", "triton"]
SEGMENTS = {
    "all three segments": [0, 0, 1, 1, 1, 2, 2, 2],
    "all clean with lambda 0": [0, 0, 0],
    "all adversarial": [2, 2, 2, 2],
    "one image in a segment": [0, 1, 1, 2, 2],
    "no lambda 0": [1, 1, 2, 2],
    "mixed order": [2, 0, 1, 2, 0, 1, 1],
}


def run(fn, args: dict, **kwargs):
    """Output, gradients of a fixed weighting, and running statistics."""
    y = fn(**args, **kwargs)
    gen = torch.Generator().manual_seed(9)
    upstream = torch.randn(y.shape, generator=gen, dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves(args).values()), upstream)
    return y.detach(), dict(zip(leaves(args), grads, strict=True)), (args["running_mean"], args["running_var"])


def assert_same(args: dict, *, backend: str, tolerance: float = 1e-10, **kwargs) -> None:
    y, grads, running = run(film_dual_bn, copy_of(args), backend=backend, **kwargs)
    expected, expected_grads, expected_running = run(film_dual_bn_reference, copy_of(args), **kwargs)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=tolerance, atol=tolerance, msg=name)
    for ours, theirs in zip(running, expected_running, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_equals_definition_for_every_mix_of_segments(segments, training, backend):
    assert_same(site_inputs(segments=segments), training=training, backend=backend)


@given(
    segments=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    channels=st.integers(1, 6),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    film=st.booleans(),
    residual=st.booleans(),
    relu=st.booleans(),
    groups=st.sampled_from([1, 2]),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_operator_equals_definition_for_any_shape(
    segments, channels, height, width, film, residual, relu, groups, backend, seed
):
    args = site_inputs(
        seed,
        segments=segments,
        channels=channels,
        height=height,
        width=width,
        film=film,
        residual=residual,
        groups=groups,
    )
    # eps well above the spread of two values keeps the comparison away from 1 / sqrt(0).
    assert_same(args, relu=relu, eps=1e-2, tolerance=1e-8, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 20.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_precision_is_as_good_as_plain_pytorch_in_the_same_dtype(dtype, mean, backend):
    args = site_inputs(segments=SEGMENTS["all three segments"], dtype=dtype, mean=mean, height=6, width=6)
    y, grads, _ = run(film_dual_bn, copy_of(args), relu=False, backend=backend)
    plain, plain_grads, _ = run(lambda **kw: film_dual_bn_reference(**kw, upcast=False), copy_of(args), relu=False)
    exact, exact_grads, _ = run(film_dual_bn_reference, copy_of(args, torch.float64), relu=False)
    assert y.dtype == dtype
    assert_as_good_as_plain(y, plain, exact, "y")
    for name, grad in grads.items():
        assert_as_good_as_plain(grad, plain_grads[name], exact_grads[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_gradcheck_and_gradgradcheck(backend):
    args = site_inputs(segments=[0, 0, 1, 1, 2, 2], channels=2, height=2, width=2)
    names = list(leaves(args))

    def fn(*values):
        fresh = {**args, **dict(zip(names, values, strict=True))}
        fresh |= {key: args[key].clone() for key in ("running_mean", "running_var")}
        return film_dual_bn(**fresh, relu=False, backend=backend)

    values = tuple(args[name] for name in names)
    # The interpreter takes minutes for every element; its random projections of the Jacobian take seconds.
    fast = backend == "triton"
    assert torch.autograd.gradcheck(fn, values, fast_mode=fast)
    assert torch.autograd.gradgradcheck(fn, values, fast_mode=fast)


def test_one_value_alone_gives_its_bias_no_gradient_and_moves_only_the_mean():
    args = site_inputs(segments=[0], height=1, width=1, film=False, residual=False)
    before_mean, before_var = args["running_mean"].clone(), args["running_var"].clone()
    y = film_dual_bn(**args, relu=False)
    torch.testing.assert_close(y[0, :, 0, 0], args["bias"][0])
    (grad,) = torch.autograd.grad(y.sum(), args["x"])
    assert torch.equal(grad, torch.zeros_like(grad))
    torch.testing.assert_close(args["running_mean"][0], 0.9 * before_mean[0] + 0.1 * args["x"][0, :, 0, 0].detach())
    assert torch.equal(args["running_var"], before_var)
    assert torch.equal(args["running_mean"][1], before_mean[1])


def test_an_empty_segment_moves_nothing():
    args = site_inputs(segments=[1, 1, 2])
    before_mean, before_var = args["running_mean"][0].clone(), args["running_var"][0].clone()
    film_dual_bn(**args)
    assert torch.equal(args["running_mean"][0], before_mean)
    assert torch.equal(args["running_var"][0], before_var)


def test_constant_images_give_finite_values_and_gradients():
    args = site_inputs(segments=[0, 0, 1, 1])
    args["x"] = torch.full_like(args["x"], 3.0).requires_grad_(True)
    y, grads, _ = run(film_dual_bn, args)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in grads.values())


def test_a_mean_a_million_times_the_spread_does_not_cancel():
    spread = torch.randn(8, 5, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    args = site_inputs(segments=[0] * 4 + [1] * 4, height=6, width=6, film=False, residual=False, dtype=torch.float32)
    x = (1e4 + 0.01 * spread).float().contiguous(memory_format=torch.channels_last)
    args["x"] = x.requires_grad_(True)
    exact = film_dual_bn_reference(**copy_of(args, torch.float64), relu=False)
    y = film_dual_bn(**args, relu=False)
    # E[x^2] - E[x]^2 in float32 would leave nothing of a variance of 1e-4 beside a squared mean of 1e8.
    assert (y.double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_memory_layout_and_gradient_strides_do_not_matter():
    args = site_inputs(segments=SEGMENTS["mixed order"])
    expected, expected_grads, _ = run(film_dual_bn, copy_of(args))
    other = copy_of(args)
    other["x"] = args["x"].detach().contiguous().requires_grad_(True)
    with pytest.warns(UserWarning, match="channels_last"):
        y = film_dual_bn(**other)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    strided = torch.empty(*y.shape[:3], 2 * y.shape[3], dtype=y.dtype)[..., ::2].copy_(upstream)
    assert not strided.is_contiguous()
    grads = torch.autograd.grad(y, list(leaves(other).values()), strided)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for (name, ours), theirs in zip(expected_grads.items(), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bit_identical(backend):
    args = site_inputs(segments=SEGMENTS["all three segments"], dtype=torch.float32, channels=32, height=8, width=8)
    first, second = (run(film_dual_bn, copy_of(args), backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


WRONG = {
    "x": (lambda a: a["x"][0], "x"),
    "weight": (lambda a: a["weight"][:, :2], "weight"),
    "running_var": (lambda a: a["running_var"][:1], "running_var"),
    "segment": (lambda a: a["segment"][:2], "segment"),
    "film_shift": (lambda a: None, "film_scale, film_shift, film_row"),
    "film_scale": (lambda a: a["film_scale"][:, :1], "film_scale"),
    "film_row": (lambda a: a["film_row"].float(), "film_row"),
    "residual": (lambda a: a["residual"][..., :1], "residual"),
    "group_of_segment": (lambda a: (0, 1, 2), "group_of_segment"),
    "eps": (lambda a: 0.0, "eps"),
    "backend": (lambda a: "numpy", "backend"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    args = site_inputs(segments=[0, 1, 2])
    replace, named = WRONG[name]
    with pytest.raises(ValueError, match=f"^{named}"):
        film_dual_bn(**{**args, name: replace(args)})


@pytest.mark.parametrize(("name", "value"), [("segment", [0, 1, 3]), ("film_row", [0, -1, 1])])
def test_an_index_out_of_range_is_named(name, value):
    args = site_inputs(segments=[0, 1, 2])
    with pytest.raises(ValueError, match=f"^{name}: expected values in"):
        film_dual_bn(**{**args, name: torch.tensor(value, dtype=torch.int32)})
