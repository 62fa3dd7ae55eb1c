"""Deployed networks answer as the conditional network: every network, conditioning, lambda and width; with load()."""

import pytest
import torch

import oat_dist
from oat_dist.config import ConditioningConfig, Config, DataConfig, ModelConfig
from oat_dist.deployment import fold_network, load, with_lambda
from oat_dist.deployment.exporting import export_model
from oat_dist.errors import UserError
from oat_dist.export import cut_out
from oat_dist.models import MODELS, build_model
from oat_dist.models.conditionalise import conditionalise
from oat_dist.runs import create_run, save_model
from tests.oat_dist.test_widths import FLOAT

LAMBDAS = (0.0, 0.05, 0.1, 0.25, 0.4, 0.9, 1.0)
BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-11}
KINDS = {
    "knots": ConditioningConfig(),
    "paper start, single": ConditioningConfig(film_start="paper", norm="single"),
    "fourier": ConditioningConfig(encoding="fourier"),
    "lambda itself, shared": ConditioningConfig(encoding="none", film="shared"),
    "table, shared statistics": ConditioningConfig(film="table", norm="shared_statistics"),
    "no FiLM": ConditioningConfig(film="none"),
    "no knot at 0": ConditioningConfig(norm="single", lambdas=(0.25, 1.0)),
    "one knot": ConditioningConfig(norm="single", lambdas=(0.25,)),
}


def make(name, *, conditioning=None, **model):
    """A configuration of few channels and every layer."""
    channels = (4, 8, 8, 12) if name.startswith("wrn") else (6, 6, 8, 12)
    if name != "resnet8" and not name.startswith("wrn"):
        channels += (16,)
    model = ModelConfig(name=name, **{"channels": channels} | model)
    return Config(model=model, conditioning=conditioning or ConditioningConfig())


def build(config, dtype=torch.float64, seed=0, in_channels=3):
    """A network far from the start: norms, statistics, FiLM and pixel statistics are all its own."""
    network = build_model(config, in_channels=in_channels, num_classes=5)
    network.normalise_pixels((0.4, 0.5, 0.6)[:in_channels], (0.2, 0.25, 0.3)[:in_channels])
    network = network.to(dtype).eval()
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if "running_var" in name:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=gen, dtype=dtype))
            elif "running_mean" in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=gen, dtype=dtype))
            elif tensor.requires_grad and tensor.dim() < 4:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=gen, dtype=dtype))
    return network


def images(num=6, dtype=torch.float64, channels=3):
    return torch.rand(num, channels, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def assert_close(found, wanted, bound=None):
    bound = BOUNDS[wanted.dtype] if bound is None else bound
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()


def assert_deployed_agrees(network, dtype, folded=LAMBDAS):
    x = images(len(LAMBDAS), dtype)
    lam_M = torch.tensor(LAMBDAS, dtype=torch.float64).repeat_interleave(len(x))
    wanted = dict(zip(LAMBDAS, network.predict(x.repeat(len(LAMBDAS), 1, 1, 1), lam_M).split(len(x)), strict=True))
    for lam in folded:
        assert_close(fold_network(network, lam)(x), wanted[lam])
    lam_N = torch.tensor(LAMBDAS, dtype=torch.float64)
    per_image = torch.stack([wanted[lam][at] for at, lam in enumerate(LAMBDAS)])
    assert_close(with_lambda(network)(x, lam_N.to(dtype)), per_image)
    return wanted


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_network_answers_alike_folded_and_with_lambda_as_an_input(name, dtype):
    wanted = assert_deployed_agrees(build(make(name), dtype), dtype)
    # Else nothing was tested: 0 and every other lambda must answer differently, but for 0.05, which answers as 0.1.
    assert torch.allclose(wanted[0.05], wanted[0.1])
    for a, b in ((0.0, 0.1), (0.1, 0.25), (0.25, 0.4), (0.4, 0.9), (0.9, 1.0)):
        assert (wanted[a] - wanted[b]).abs().max() > 1e-3 * wanted[a].abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resnet8", "wrn10_2"])
def test_every_conditioning_answers_alike_folded_and_with_lambda_as_an_input(name, kind):
    network = build(make(name, conditioning=KINDS[kind]))
    assert_deployed_agrees(network, torch.float64, folded=(0.0, 0.05, 0.25))


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", ["resnet8", "wrn10_2"])
def test_every_width_answers_alike_folded_and_with_lambda_as_an_input(name, heads):
    network = build(make(name, widths=(0.5, 0.75, 1.0), width_heads=heads))
    x, lam = images(), torch.tensor([0, 0.1, 0.3, 1, 0, 0.7], dtype=torch.float64)
    for width in (0.5, 0.75, 1.0):
        narrow = cut_out(network, width)
        assert_close(with_lambda(narrow)(x, lam), network.predict(x, lam, width=width))
        for value in (0.0, 0.3):
            assert_close(fold_network(narrow, value)(x), network.predict(x, value, width=width))
    assert_close(fold_network(network, 0.3)(x), network.predict(x, 0.3))


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_network_has_no_more_parameters_than_one_without_conditioning(name):
    plain = build(make(name, conditioning=ConditioningConfig(film="none", norm="single")))
    folded = fold_network(build(make(name)), 0.3)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(folded) <= count(plain)
    left = [module for module in folded.modules() if type(module).__name__ == "Affine"]
    blocks = len(folded.network.blocks)
    assert len(left) == (blocks + 1 if name.startswith(("wrn", "preact")) else 0)


def test_deploying_leaves_the_network_alone():
    network = build(make("wrn10_2", conditioning=KINDS["fourier"]))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fold_network(network, 0.3).float(), with_lambda(network).float()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_what_is_no_constant_is_refused_in_one_line():
    noisy = build(make("resnet8", conditioning=FLOAT))
    for deploy in (lambda: fold_network(noisy, 0.3), lambda: with_lambda(noisy)):
        with pytest.raises(UserError, match=r"^conditioning.kind=float: answers by a mean over draws of weight noise"):
            deploy()
    with pytest.raises(UserError, match=r"^lam=1.5: lambda must lie in \[0, 1\]$"):
        fold_network(build(make("resnet8")), 1.5)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with pytest.raises(UserError, match=r"^module Sequential: networks of `conditionalise` are not exported"):
        fold_network(conditionalise(module, ConditioningConfig(), seed=0), 0.3)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A finished run of two widths with knots; its network has moved from its start."""
    return make_run(digits, tmp_path_factory.mktemp("runs"), make("wrn10_2", widths=(0.5, 1.0)))


def make_run(digits, folder, config):
    settings = {"output_dir": str(folder), "data": DataConfig(root=str(digits.folder.parent), normalise=True)}
    config = oat_dist.Config(model=config.model, conditioning=config.conditioning, **settings)
    run = create_run(config, digits, {}, 1)
    network = build_model(config, in_channels=1, num_classes=10)
    moved = build(config, torch.float32, in_channels=1)
    network.load_state_dict(
        {name: t if t.shape == network.state_dict()[name].shape else network.state_dict()[name]
         for name, t in moved.state_dict().items()}
    )  # fmt: skip
    save_model(network, digits, run / "model.safetensors")
    return run


@pytest.fixture(scope="module")
def loaded(run, tmp_path_factory):
    """Every kind of path, loaded."""
    folder = tmp_path_factory.mktemp("exported")
    network = oat_dist.load_run(run)[1]
    models = {"run": load(run), "input": load(export_model(run, None, "safetensors", folder / "input.safetensors"))}
    return network, models, load(export_model(run, 0.3, "safetensors", folder / "folded.safetensors"))


def test_load_answers_as_the_run_for_one_lambda_and_for_one_per_image(run, loaded):
    network, models, folded = loaded
    x = images(5, torch.float32, channels=1)
    for model in models.values():
        assert_close(model(x, 0.3), network.predict(x, 0.3))
        for lam in ([0, 0.1, 0.3, 1, 0.7], torch.tensor([0, 0.1, 0.3, 1, 0.7])):
            assert_close(model(x, lam), network.predict(x, torch.tensor([0, 0.1, 0.3, 1, 0.7])))
        assert len(model.classes) == 10 and model.image_shape == (8, 8, 1) and model.lam is None
    for lam in (0.3, None, torch.full((5,), 0.3)):
        assert_close(folded(x, lam), network.predict(x, 0.3))
    assert folded.lam == 0.3
    assert_close(load(run, width=0.5)(x, 0.3), network.predict(x, 0.3, width=0.5))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("which", ["run", "input"])
def test_the_other_images_of_a_batch_and_their_lambdas_do_not_change_the_logits_of_an_image(
    loaded, which, dtype, bound
):
    model = loaded[1][which].to(dtype)
    x, gen = images(24, dtype, channels=1), torch.Generator().manual_seed(3)
    lam = torch.tensor([0, 0.1, 0.3, 1, 0.05, 0.77], dtype=torch.float64).repeat(4)
    wanted = torch.cat([model(x[at : at + 1], lam[at].item()) for at in range(24)])
    for order in (torch.arange(24), torch.randperm(24, generator=gen)):
        for size in (2, 7, 24):
            for part in order.split(size):
                assert_close(model(x[part], lam[part]), wanted[part], bound)
    # One image among others that all have another lambda.
    for other in (0.0, 0.1, 0.6):
        beside = torch.full((24,), other, dtype=torch.float64)
        beside[4] = 0.05
        assert_close(model(x, beside)[4], wanted[4], bound)
    model.float()


def test_a_lambda_that_cannot_be_is_refused_by_name(loaded):
    _, models, folded = loaded
    x = images(2, torch.float32, channels=1)
    for lam, message in (
        (1.5, r"^lam=1.5: lambda must lie in \[0, 1\]$"),
        (float("nan"), r"^lam=nan: lambda must"),
        ([0.1, -1], r"^lam=-1.0: lambda must"),
        ([0.1, 0.2, 0.3], r"^lam: shape \[3\] for 2 images"),
        ("strong", r"^lam='strong': must be a number"),
        (None, r"^lam=None: this network takes lambda"),
    ):
        for model in models.values():
            with pytest.raises(UserError, match=message):
                model(x, lam)
    with pytest.raises(UserError, match=r"^lam: this network was exported at 0.3 alone"):
        folded(x, [0.3, 0.4])


def test_load_reads_nothing_that_is_unpickled_and_names_what_is_wrong(run, tmp_path):
    for name, message in (
        ("a.pt2", "torch.export.load, which reads it, unpickles"),
        ("a.onnx", "of another program"),
        ("b", "of another program"),
    ):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(UserError, match=f"{name}: not read here .{message}"):
            load(tmp_path / name)
    (tmp_path / "c.safetensors").write_bytes(b"PK")
    for path, message in (
        (tmp_path, "no config.yaml"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "c.safetensors", "damaged, or not a safetensors file"),
        (run / "model.safetensors", "name the folder of its run"),
    ):
        with pytest.raises(UserError, match=message):
            load(path)
    with pytest.raises(UserError, match=r"width=0.4: was not trained"):
        load(run, width=0.4)
