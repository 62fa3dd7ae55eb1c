"""All FiLM generators at once are each on its own; all sites folded at once are each on its own."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oat_dist.config import ConditioningConfig, Config, ModelConfig
from oat_dist.models import build_model
from oat_dist.models.film import FiLMGenerator, generate
from oat_dist.models.norm import fold

WIDTHS = (5, 3, 5, 7, 3, 5)
LAM = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=torch.float64)


def make_generators(start, dtype=torch.float64) -> torch.nn.ModuleList:
    torch.manual_seed(0)
    generators = torch.nn.ModuleList(FiLMGenerator(4, width, start) for width in WIDTHS).to(dtype)
    for parameter in generators.parameters():
        torch.nn.init.normal_(parameter)
    return generators


def disturbed(name="resnet8", **conditioning):
    """A network of float64 whose parameters and statistics are all different."""
    config = Config(model=ModelConfig(name=name), conditioning=ConditioningConfig(**conditioning))
    network = build_model(config, in_channels=1, num_classes=10).double()
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in network.sites:
            for tensor in (*site.parameters(), site.running_mean, site.running_var):
                tensor.add_(torch.rand(tensor.shape, generator=gen, dtype=torch.float64))
    return network


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("mixed", [False, True])
def test_batched_generators_give_the_values_and_gradients_of_each_alone(start, mixed):
    together, alone = make_generators(start), make_generators(start)
    code = torch.randn(6, 4, dtype=torch.float64)
    mix = torch.rand(3, 6, dtype=torch.float64) if mixed else None
    got = generate(together, code, mix)
    expected = [generator(code) for generator in alone]
    if mixed:
        expected = [(mix @ scale, mix @ shift) for scale, shift in expected]
    for outputs in (got, expected):
        sum((scale.square() * shift.cos()).sum() for scale, shift in outputs).backward()
    for ours, theirs, width in zip(got, expected, WIDTHS, strict=True):
        assert ours[0].shape == ours[1].shape == (3 if mixed else 6, width)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


class _Products(TorchDispatchMode):
    """Counts matrix products and all operators."""

    def __init__(self):
        super().__init__()
        self.products = self.all = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += any(name in str(func) for name in ("mm.", "addmm", "bmm"))
        self.all += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "widths"), [("resnet8", 3), ("wrn10_2", 4)])
def test_a_condition_takes_two_products_per_width_whatever_the_number_of_sites(name, widths):
    network = disturbed(name)
    with _Products() as counted:
        network.condition(LAM)
    assert counted.products == 2 * widths
    assert sum(site.film is not None for site in network.sites) > widths


@pytest.mark.parametrize("film", ["mlp", "none"])
def test_folding_takes_as_many_operations_for_many_sites_as_for_few(film):
    counts = []
    for name in ("resnet8", "resnet18"):
        network = disturbed(name, film=film)
        cond = network.condition(LAM)
        with _Products() as counted:
            fold(network.sites, cond)
        views = 2 * len(network.sites)  # memory for the results is no work
        counts.append(counted.all - views)
    assert counts[0] == counts[1] < 30


@pytest.mark.parametrize("norm", ["dual", "single"])
def test_folded_sites_are_the_affine_of_their_running_statistics(norm):
    network = disturbed(norm=norm)
    network.sites[2].eps = 0.3
    cond = network.condition(LAM)
    for site, (scale, shift) in zip(network.sites, fold(network.sites, cond), strict=True):
        assert scale.is_contiguous() and shift.is_contiguous() and not scale.requires_grad
        for row, lam in enumerate(network.encoder.knots):
            group = int(lam > 0 and norm == "dual")
            a = site.weight[group] / (site.running_var[group] + site.eps).sqrt()
            b = site.bias[group] - a * site.running_mean[group]
            if site.film is not None:
                film_scale, film_shift = (t[row] for t in site.film(network.encoder.codes_KE))
                a, b = film_scale * a, film_scale * b + film_shift
            torch.testing.assert_close(scale[row], a, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(shift[row], b, rtol=1e-12, atol=1e-12)


def test_conditioning_stays_float32_under_autocast():
    network = disturbed().float()
    expected = network.condition(LAM)
    with torch.autocast("cpu", torch.bfloat16):
        cond = network.condition(LAM)
        frozen = network.freeze(cond)
    for got, exact in zip(cond.films, expected.films, strict=True):
        assert (got is None) == (exact is None)
        if got is not None:
            assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, exact, strict=True))
    assert all(t.dtype == torch.float32 for pair in frozen.affines for t in pair)


def test_the_generators_of_an_interpolated_lambda_get_gradients():
    network = disturbed()
    twin = copy.deepcopy(network)
    lam = torch.tensor([0.0, 0.25, 0.7], dtype=torch.float64)
    mix = network.encoder.plan(lam)
    sum((f[0] * f[1]).sum() for f in network.condition(lam).films if f).backward()
    for site in twin.sites:
        if site.film is not None:
            scale, shift = site.film(twin.encoder.codes_KE)
            ((mix @ scale) * (mix @ shift)).sum().backward()
    for (name, ours), theirs in zip(network.named_parameters(), twin.parameters(), strict=True):
        if ".film." in name:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12, msg=name)
