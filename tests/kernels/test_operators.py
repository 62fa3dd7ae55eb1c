"""The registered operators obey torch's contract, and compile and export to what eager mode computes."""

import sys
import warnings

import pytest
import torch

from kernels import film_dual_bn, modulate, registered
from tests.numerics import copy_of, leaves, site_inputs

OPTIONS = {
    "everything": {"film": True, "residual": True, "relu": True},
    "plain": {"film": False, "residual": False, "relu": False},
    "residual without activation": {"film": True, "residual": True, "relu": False},
}


def site_arguments(*, film: bool, residual: bool, relu: bool, dtype=torch.float64, backend="torch") -> tuple:
    args = site_inputs(segments=[0, 1, 1, 2], film=film, residual=residual, dtype=dtype)
    names = ("x", "weight", "bias", "film_scale", "film_shift", "residual", "segment", "film_row")
    return *(args.get(name) for name in names), list(args["group_of_segment"]), relu, 1e-5, False, backend


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_registered_site_passes_opcheck(options, dtype):
    torch.library.opcheck(registered.film_dual_bn, site_arguments(**options, dtype=dtype))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("wants", [("x",), ("x", "scale", "shift", "residual")])
def test_the_registered_modulate_passes_opcheck(relu, wants):
    gen = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(4, 3, 2, 2, generator=gen).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    scale, shift = (torch.randn(2, 3, generator=gen) for _ in range(2))
    named = {"x": x, "scale": scale, "shift": shift, "residual": residual}
    values = [t.requires_grad_(name in wants) for name, t in named.items()]
    torch.library.opcheck(registered.modulate, (*values, torch.tensor([0, 1, 1, 0]), relu, "torch"))


def test_the_registered_update_of_running_statistics_passes_opcheck():
    gen = torch.Generator().manual_seed(0)
    running = [torch.rand(2, 3, generator=gen) for _ in range(2)]
    batch = [torch.tensor([4.0, 0.0, 1.0]), torch.rand(3, 3, generator=gen), torch.rand(3, 3, generator=gen)]
    torch.library.opcheck(registered.update_running, (*running, *batch, [0, 1, 1], 0.1, "torch"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_compiled_site_without_graph_breaks_equals_the_eager_one(options):
    relu = options["relu"]
    args = site_inputs(segments=[0, 1, 1, 2, 0], film=options["film"], residual=options["residual"])
    other = copy_of(args)

    def loss(values: dict) -> torch.Tensor:
        return film_dual_bn(**values, relu=relu).square().sum()

    eager = torch.autograd.grad(loss(args), list(leaves(args).values()))
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled = torch.autograd.grad(compiled_loss(other), list(leaves(other).values()))
    for name, expected, got in zip(leaves(args), eager, compiled, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=name)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(other[name], args[name], rtol=1e-12, atol=1e-12, msg=name)


def test_a_compiled_attack_step_equals_the_eager_one():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 2, generator=gen).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    scale, shift, row = torch.randn(2, 3, generator=gen), torch.randn(2, 3, generator=gen), torch.tensor([0, 1, 1, 0])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return modulate(x, scale, shift, row).square().sum()

    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(compiled, eager)


def test_export_keeps_the_operator_whole():
    class Site(torch.nn.Module):
        def forward(self, x, scale, shift, row):
            return modulate(x, scale, shift, row)

    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 2, generator=gen).contiguous(memory_format=torch.channels_last)
    inputs = (x, torch.randn(2, 3, generator=gen), torch.randn(2, 3, generator=gen), torch.tensor([0, 1, 1, 0]))
    exported = torch.export.export(Site(), inputs)
    assert any(node.target is torch.ops.oat.modulate.default for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*inputs), modulate(*inputs))


def test_a_site_saves_its_input_and_output_and_small_tensors_alone():
    args = site_inputs(segments=[0, 1, 1, 2], height=8, width=8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = film_dual_bn(**args)
    large = {t.data_ptr() for t in saved if t.numel() >= args["x"].numel()}
    assert large == {args["x"].data_ptr(), y.data_ptr()}


def test_an_attack_step_saves_its_output_alone():
    args = site_inputs(segments=[0, 1, 1, 2], height=8, width=8)
    scale = torch.ones(1, args["x"].shape[1], dtype=torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = modulate(args["x"], scale, scale, torch.zeros(4, dtype=torch.int64), residual=args["residual"])
    assert [t.data_ptr() for t in saved if t.numel() >= args["x"].numel()] == [y.data_ptr()]


def test_an_input_in_another_layout_is_converted_with_a_warning_that_names_the_site():
    args = site_inputs(segments=[0, 1, 1, 2])
    contiguous = copy_of(args)
    contiguous["x"] = args["x"].detach().contiguous().requires_grad_(True)
    with pytest.warns(UserWarning, match=r"^blocks\.3\.norm1: x is not contiguous in channels_last"):
        y = film_dual_bn(**contiguous, site="blocks.3.norm1")
    assert y.is_contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(film_dual_bn(**args), y)


def test_triton_without_gpu_or_interpreter_is_named(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so nothing is amiss")
    monkeypatch.delenv("TRITON_INTERPRET")
    args = site_inputs(segments=[0, 1, 1, 2])
    with pytest.raises(ValueError, match=r"^backend='triton': x is on cpu; needs a GPU, or TRITON_INTERPRET=1"):
        film_dual_bn(**args, backend="triton")


def test_auto_is_plain_torch_on_a_cpu(monkeypatch):
    asked = []
    passes = sys.modules["kernels.operators"].passes
    monkeypatch.setattr(
        sys.modules["kernels.operators"], "passes", lambda backend: asked.append(backend) or passes(backend)
    )
    film_dual_bn(**site_inputs(segments=[0, 1, 1, 2]))
    assert set(asked) == {"torch"}


def test_gradients_of_gradients_through_modulate_pass_gradgradcheck():
    gen = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(3, 2, 2, 2, generator=gen, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    scale, shift = (torch.randn(2, 2, generator=gen, dtype=torch.float64) for _ in range(2))
    values = tuple(t.requires_grad_(True) for t in (x, scale, shift, residual))
    row = torch.tensor([1, 0, 1])

    def fn(x, scale, shift, residual):
        return modulate(x, scale, shift, row, residual=residual, relu=False)

    assert torch.autograd.gradcheck(fn, values) and torch.autograd.gradgradcheck(fn, values)


def test_gradients_with_and_without_a_graph_are_the_same():
    args = site_inputs(segments=[0, 1, 1, 2, 0, 2])
    wanted = list(leaves(args).values())
    y = film_dual_bn(**args)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    fast = torch.autograd.grad(y, wanted, upstream, retain_graph=True)
    with_graph = torch.autograd.grad(y, wanted, upstream, create_graph=True)
    for name, a, b in zip(leaves(args), fast, with_graph, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-10, msg=name)
    assert any(g.requires_grad for g in with_graph)
