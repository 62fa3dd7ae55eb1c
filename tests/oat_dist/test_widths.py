"""A width of a slimmable network is the plainly built narrow network: forward, gradients, statistics, frozen."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch import train
from oat_dist.config import ConditioningConfig, Config, ModelConfig, fingerprint
from oat_dist.errors import UserError
from oat_dist.export import cut_config, cut_out
from oat_dist.models import MODELS, build_model
from oat_dist.models.preact_resnet import PreActResNet
from oat_dist.models.slimming import channels_at, idle_parameters, widths_of_step, widths_per_step
from oat_dist.random import draw_keys

WIDTHS = (0.3, 0.75, 1.0)
LAM = torch.tensor([0, 0, 0.1, 0.25, 1, 1], dtype=torch.float64)
FLOAT = ConditioningConfig(kind="float", film="none", lambdas=(0.0, 1.0))
KINDS = {
    "mlp": ConditioningConfig(),
    "paper start, single": ConditioningConfig(film_start="paper", norm="single"),
    "shared": ConditioningConfig(film="shared"),
    "table, shared statistics": ConditioningConfig(film="table", norm="shared_statistics"),
    "weight noise": FLOAT,
}


def make(name="resnet8", *, conditioning=None, **model) -> Config:
    model = ModelConfig(name=name, **{"widths": WIDTHS} | model)
    return Config(model=model, conditioning=conditioning or ConditioningConfig())


def build(config, dtype=torch.float64):
    """A network of which everything has moved from its start."""
    network = build_model(config, in_channels=3, num_classes=10).to(dtype)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if "running_" in name or tensor.requires_grad:
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=gen, dtype=dtype))
    return network


def lambdas_of(config):
    return (LAM > 0.2).double() if config.conditioning.kind == "float" else LAM


def images(num=6, dtype=torch.float64):
    return torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.fixture(params=["resnet8", "wrn10_2", "preactresnet18"])
def name(request, monkeypatch):
    shrunk = partial(PreActResNet, blocks=(1, 1), widths=(8, 12))
    monkeypatch.setitem(MODELS, "preactresnet18", shrunk)
    return request.param


def assert_width_is_the_plain_network(config, width):
    network = build(config)
    plain = build_model(cut_config(config, width), in_channels=3, num_classes=10).double()
    plain.load_state_dict(cut_out(network, width).state_dict(), strict=True)
    lam, x, key = lambdas_of(config), images(), draw_keys(3, "noise")
    logits = network(x, network.condition(lam, width=width, noise_key=key))
    expected = plain(x, plain.condition(lam, noise_key=key))
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    for answer in (logits, expected):
        answer.square().sum().backward()
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    of_width = dict(cut_out(_gradients_as_weights(network), width).named_parameters())
    for n, gradient in gradients.items():
        torch.testing.assert_close(of_width[n].detach(), gradient, rtol=1e-9, atol=1e-9, msg=n)
    moved, by_hand = cut_out(network, width).state_dict(), plain.state_dict()
    for n, tensor in by_hand.items():
        torch.testing.assert_close(moved[n], tensor, rtol=1e-12, atol=1e-12, msg=n)


def test_the_width_of_all_channels_is_the_run_of_the_network_without_widths():
    config = make(width_rule="sandwich")
    assert fingerprint(cut_config(config, 1.0)) == fingerprint(make(widths=(1.0,)))
    assert len({fingerprint(cut_config(config, width)) for width in WIDTHS}) == 3


def _gradients_as_weights(network):
    """The network with every parameter's gradient in its place."""
    with torch.no_grad():
        weights = {n: p.clone() for n, p in network.named_parameters()}
        for p in network.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        shown = copy.deepcopy(network)
        for n, p in network.named_parameters():
            p.copy_(weights[n])
    return shown


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_of_every_kind_of_network_is_the_plainly_built_network_of_its_channels(name, width):
    assert_width_is_the_plain_network(make(name, width_heads=True), width)


@pytest.mark.parametrize("kind", KINDS)
def test_a_width_is_the_plain_network_with_every_conditioning(kind):
    assert_width_is_the_plain_network(make(conditioning=KINDS[kind]), 0.3)


def test_every_layer_of_a_width_has_its_share_of_the_channels_rounded():
    narrow = cut_out(build(make("wrn10_2")), 0.3)
    assert narrow.stem.weight.shape == (5, 3, 3, 3)  # 4.8 of 16
    assert [block.conv2.weight.shape[:2] for block in narrow.blocks] == [(10, 10), (19, 19), (38, 38)]
    assert narrow.classifier.weight.shape == (10, 38)
    assert [channels_at(16, width) for width in (0.3, 0.28, 0.03125, 1.0)] == [5, 4, 1, 16]


class _Strides(TorchDispatchMode):
    """Kernel, stride and input channels of all convolutions, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = {"convolution": [], "convolution_backward": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.seen:
            weight, stride = (args[1], args[3]) if name == "convolution" else (args[2], args[4])
            self.seen[name].append((weight.shape[2], stride[0], weight.shape[1]))
        return func(*args, **kwargs or {})


def test_narrow_shortcuts_do_not_meet_the_fault_of_onednn(name):
    config = make(name, widths=(0.25, 1.0))
    network, x = build(config, torch.float32), images(dtype=torch.float32)
    expected = copy.deepcopy(network).double()
    with _Strides() as strides:
        network(x, network.condition(LAM, width=0.25)).square().sum().backward()
    assert len(strides.seen["convolution"]) == len(strides.seen["convolution_backward"]) == len(network.layers) - 1
    for seen in strides.seen.values():
        assert not [of for of in seen if of[0] == 1 and of[1] > 1 and of[2] < 16]
        assert len([of for of in seen if of[0] == 1]) == len([n for n in network.layers if "shortcut" in n])
    expected(x.double(), expected.condition(LAM, width=0.25)).square().sum().backward()
    for (n, p), q in zip(network.named_parameters(), expected.parameters(), strict=True):
        if p.grad is not None:
            scale = q.grad.abs().max().item()
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-4 * scale, msg=n)


def test_an_ordinary_network_has_the_names_it_had_and_a_slimmable_one_has_them_too():
    plain = build_model(Config(), in_channels=3, num_classes=10).state_dict()
    slimmable = build_model(make(width_heads=True), in_channels=3, num_classes=10).state_dict()
    assert not [name for name in plain if "narrow" in name]
    assert {name: slimmable[name].shape for name in plain} == {name: plain[name].shape for name in plain}
    more = [name for name in slimmable if name not in plain]
    assert "stem_norm.narrow.0_3.running_mean" in more and "classifier.narrow.0_75.weight" in more
    assert all(".narrow." in name for name in more)


def test_a_training_forward_moves_the_statistics_of_its_width_alone():
    network = build(make())
    before = {n: b.clone() for n, b in network.named_buffers()}
    network(images(), network.condition(LAM, width=0.75))
    moved = {n for n, b in network.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {f"{s.name}.narrow.0_75.{k}" for s in network.sites for k in ("running_mean", "running_var")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_frozen_width_answers_as_the_width_in_evaluation_mode(kind, width):
    config = make(conditioning=KINDS[kind])
    network, x, key = build(config), images(4), draw_keys(0, "noise")
    lam = torch.ones(4, dtype=torch.float64) if kind == "weight noise" else LAM[1:5]
    cond = network.condition(lam, width=width, noise_key=key)
    in_training_mode = network.attack_logits(x, network.freeze(cond))
    expected = network.eval()(x, network.condition(lam, width=width, noise_key=key))
    torch.testing.assert_close(in_training_mode, expected, rtol=1e-10, atol=1e-10)
    assert not in_training_mode.requires_grad


def test_prediction_takes_the_width_and_widths_differ():
    network, x = build(make()), images()
    answers = [network.predict(x, LAM, width=width) for width in WIDTHS]
    assert all(answer.shape == (6, 10) for answer in answers)
    assert not torch.allclose(answers[0], answers[1]) and not torch.allclose(answers[1], answers[2])
    assert torch.equal(network.predict(x, LAM), answers[2])


@pytest.mark.parametrize("config", [make(width_heads=True), make(conditioning=FLOAT)], ids=["heads", "weight noise"])
@pytest.mark.parametrize("width", WIDTHS)
def test_idle_parameters_are_those_that_a_forward_of_the_width_gives_no_gradient(config, width):
    network = build(config)
    zeros = torch.zeros(6, dtype=torch.float64) if config.conditioning.kind == "float" else LAM
    network(images(), network.condition(zeros, width=width)).sum().backward()
    without = {n for n, p in network.named_parameters() if p.grad is None}
    idle = {id(p) for p in idle_parameters(network, width)}
    assert without == {n for n, p in network.named_parameters() if id(p) in idle}
    assert without


def test_an_ordinary_network_has_no_idle_parameters():
    assert not list(idle_parameters(build_model(Config(), in_channels=3, num_classes=10), 1.0))


def test_all_widths_are_trained_in_every_step_the_largest_first():
    assert widths_of_step(make().model, 0, 5) == (1.0, 0.75, 0.3)
    assert widths_of_step(Config().model, 0, 5) == (1.0,)
    assert (widths_per_step(make().model), widths_per_step(Config().model)) == (3, 1)


def test_the_sandwich_rule_has_both_ends_and_random_others_by_seed_and_step():
    cfg = ModelConfig(widths=(0.2, 0.4, 0.5, 0.6, 0.8, 1.0), width_rule="sandwich")
    steps = [widths_of_step(cfg, 0, step) for step in range(60)]
    assert all((widths[0], widths[-1], len(widths)) == (1.0, 0.2, 4) for widths in steps)
    assert all(widths == tuple(sorted(set(widths), reverse=True)) for widths in steps)
    assert {width for widths in steps for width in widths} == set(cfg.widths)
    assert steps == [widths_of_step(cfg, 0, step) for step in range(60)]
    assert steps != [widths_of_step(cfg, 1, step) for step in range(60)]
    assert widths_per_step(cfg) == 4
    none = dataclasses.replace(cfg, width_samples=0)
    assert (widths_of_step(none, 0, 0), widths_per_step(none)) == ((1.0, 0.2), 2)
    assert widths_per_step(dataclasses.replace(cfg, width_samples=9)) == 6


def test_a_width_that_the_network_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"width=0.6: was not trained; the model.widths of this network are 0.3, 0.75"):
        build(make()).predict(images(), 0.1, width=0.6)


WRONG = {
    "--model.widths=[0.01,1]": r"model.widths=\(0.01, 1.0\): leaves a layer of 16 channels without any; resnet8 has",
    "--model.channels=[8,16]": r"model.channels=\(8, 16\): must be 4 numbers, for stem and stages of model.name=",
    "--model.channels=[8,16,32,64]": r"model.channels=\(8, 16, 32, 64\): the first two must be equal",
}


@pytest.mark.parametrize("argument", WRONG)
def test_channels_that_cannot_be_are_one_line_that_names_the_key(argument):
    with pytest.raises(UserError, match=WRONG[argument]) as error:
        train.main([argument, "--dry-run"])
    assert "\n" not in str(error.value)
