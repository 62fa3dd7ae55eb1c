"""A network that is not ours, made conditional: equal at its start, trainable, checked."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

import oat_dist
from oat_dist.config import AttackConfig, ConditioningConfig, Config
from oat_dist.data import Batch
from oat_dist.errors import UserError
from oat_dist.optim import AveragedNetwork
from oat_dist.step import training_losses

LAM = torch.tensor([0.0, 0.0, 0.1, 0.25, 0.4, 1.0], dtype=torch.float64)


class Squeeze(nn.Module):
    """A branch of its own, whose norm serves twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=2), nn.Dropout2d(0.25))
        self.bn = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.05)
        self.alias = self.bn

    def forward(self, x):
        return self.alias(nn.functional.silu(self.bn(self.conv(x))))


class ForeignNet(nn.Module):
    """VGG-like, as others write it: nested Sequential, biases, in-place ReLU, max pooling, dropout, a frozen norm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            nn.MaxPool2d(2),
            nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), Squeeze(12)),
            nn.AdaptiveAvgPool2d((2, 2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 10))

    def forward(self, x):
        return self.head(self.features(x))


def foreign(dtype=torch.float64) -> ForeignNet:
    """A network that has seen some images."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = ForeignNet().to(dtype)
        for _ in range(3):
            module(torch.randn(8, 3, 12, 12, dtype=dtype))
        for parameter in module.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module


def images(num=6, dtype=torch.float64):
    return torch.rand(num, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=dtype)


def make(module=None, skip=(), **conditioning):
    return oat_dist.conditionalise(module or foreign(), ConditioningConfig(**conditioning), seed=0, skip=skip)


@pytest.mark.parametrize("settings", [{}, {"norm": "single"}, {"film": "none"}, {"encoding": "fourier"}], ids=str)
def test_before_training_the_network_answers_as_the_module_at_every_lambda(settings):
    module, x = foreign().eval(), images()
    network, expected = make(module, **settings), module(x)
    for lam in (0.0, 0.05, 0.1, 0.7, 1.0, LAM):
        torch.testing.assert_close(network.predict(x, lam), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(network(x, network.condition(LAM)), expected, rtol=0, atol=1e-6)


def test_the_module_and_the_global_generator_stay_as_they_are():
    module = foreign()
    before, random_state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    network = make(module)
    assert torch.equal(torch.get_rng_state(), random_state)
    network(images(), network.condition(LAM)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_norms_keep_their_momentum_eps_statistics_and_mode_and_serve_twice_where_they_did():
    module = foreign()
    module.features[0][1].eval()
    module.features[0][1].weight.requires_grad_(False)
    network = make(module)
    assert len(network.sites) == 3
    squeeze, theirs = network.module.features[2][3], module.features[2][3].bn
    assert squeeze.alias is squeeze.bn
    assert (squeeze.bn.momentum, squeeze.bn.eps) == (0.05, 1e-3)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(squeeze.bn, name), getattr(theirs, name).expand(2, -1)), name
    frozen = network.module.features[0][1]
    assert not frozen.training and not frozen.weight.requires_grad and frozen.bias.requires_grad
    assert network.training and squeeze.bn.training


def test_a_skipped_norm_gets_no_film_but_both_groups():
    network = make(skip=["features.2.3.bn"])
    skipped = network.module.features[2][3].bn
    assert [site.film is None for site in network.sites] == [False, False, True]
    assert skipped.weight.shape == (2, 12)


def test_a_frozen_conditional_network_answers_as_in_evaluation_mode_and_has_no_dropout():
    network, x = make(film_start="paper"), images()
    network(x, network.condition(LAM))
    in_training_mode = network.attack_logits(x, network.freeze(network.condition(LAM)))
    assert network.training and all(m.training for m in network.modules())
    network.eval()
    torch.testing.assert_close(in_training_mode, network(x, network.condition(LAM)), rtol=1e-10, atol=1e-10)


def test_a_step_reaches_every_parameter():
    config = Config(attack=AttackConfig(steps=2), conditioning=ConditioningConfig(film_start="paper"))
    network = oat_dist.conditionalise(foreign(), config.conditioning, seed=0)
    batch = Batch(image_NCHW=images(), label_N=torch.arange(6), index_N=torch.arange(6), position_N=torch.arange(6))
    losses = training_losses(network, batch, LAM, config=config, epoch=0, forward=network)
    losses.loss_N.mean().backward()
    assert losses.loss_N.isfinite().all()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_state_reads_back_into_another_conversion(tmp_path):
    network, x = make(film_start="paper"), images()
    network(x, network.condition(LAM))
    # Cloned, because safetensors takes no tensor that stands under two names.
    safetensors.torch.save_file(
        {k: v.clone() for k, v in network.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    other = oat_dist.conditionalise(ForeignNet().double(), ConditioningConfig(film_start="paper"), seed=9)
    assert not torch.equal(other.predict(x, 0.4), network.predict(x, 0.4))
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"), strict=True)
    assert torch.equal(other.predict(x, LAM), network.predict(x, LAM))


def test_a_copy_answers_by_itself():
    network, x = make(film_start="paper"), images()
    averaged = AveragedNetwork(network, 0.5)
    expected = network.predict(x, 0.4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(averaged.network.predict(x, 0.4), expected)


def test_a_condition_ends_with_its_forward_even_when_that_fails():
    network = make()
    with pytest.raises(RuntimeError):
        network(images()[:, :2], network.condition(LAM))
    with pytest.raises(UserError, match=r"network.module: has no lambda when called alone"):
        network.module(images())


def test_float32_networks_stay_float32():
    network = make(foreign(torch.float32))
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network.predict(images(dtype=torch.float32), 0.25).dtype == torch.float32


REFUSED = {
    "SyncBatchNorm": (nn.SyncBatchNorm(3), "module 0: SyncBatchNorm; use BatchNorm2d"),
    "BatchNorm1d": (nn.BatchNorm1d(3), "module 0: BatchNorm1d mixes the images"),
    "not affine": (nn.BatchNorm2d(3, affine=False), "module 0: BatchNorm2d needs affine=True"),
    "no statistics": (
        nn.BatchNorm2d(3, track_running_stats=False),
        "module 0: BatchNorm2d needs affine=True and track",
    ),
    "lazy": (nn.LazyBatchNorm2d(), "module 0: LazyBatchNorm2d has no parameters yet"),
    "cumulative": (nn.BatchNorm2d(3, momentum=None), "module 0: BatchNorm2d with momentum=None"),
    "GroupNorm alone": (nn.GroupNorm(1, 3), "module Sequential: has no BatchNorm2d"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_module_that_cannot_be_made_conditional_is_refused_by_name(case):
    norm, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        make(nn.Sequential(norm))
    assert str(error.value).startswith(message)


def test_an_unknown_name_to_skip_is_refused():
    with pytest.raises(UserError, match=r"skip=\['features.9'\]: no such BatchNorm2d .* features.0.1, features.2.1"):
        make(skip=["features.9"])
