"""Starting from weights: plain and conditional files, and files that do not fit."""

import os
import pickle
import re

import pytest
import safetensors.torch
import torch

from oat_dist.config import ConditioningConfig, Config, DataConfig, ModelConfig
from oat_dist.errors import UserError
from oat_dist.models import build_model
from oat_dist.models.conditionalise import conditionalise
from oat_dist.models.init_from import initialise_from

PLAIN = {"film": "none", "norm": "single"}
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def build(name="resnet8", seed=0, classes=10, **conditioning):
    config = Config(seed=seed, model=ModelConfig(name=name), conditioning=ConditioningConfig(**conditioning))
    network = build_model(config, in_channels=3, num_classes=classes)
    network(X, network.condition(torch.tensor([0, 0, 1.0, 1.0])))
    return network


def saved(network, path, change=lambda tensors: None) -> str:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("name", ["resnet8", "wrn10_2"])
@pytest.mark.parametrize("norm", ["dual", "single"])
def test_a_conditional_network_from_plain_weights_answers_as_the_plain_one_at_every_lambda(name, norm, tmp_path):
    plain, network = build(name, **PLAIN), build(name, seed=1, norm=norm)
    initialise_from(network, saved(plain, tmp_path / "plain.safetensors"))
    for lam in (0.0, 0.15, 1.0):
        torch.testing.assert_close(network.predict(X, lam), plain.predict(X, 0.0), rtol=1e-5, atol=1e-6)


def test_plain_weights_leave_film_and_encoding_at_their_start(tmp_path):
    network = build(seed=1, film_start="paper")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    initialise_from(network, saved(build(**PLAIN), tmp_path / "plain.safetensors"))
    kept = {name for name, tensor in network.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in before if ".film." in name or name.startswith("encoder.")} <= kept
    assert "stem.weight" not in kept and "stem_norm.running_mean" not in kept


@pytest.mark.parametrize("settings", [{}, PLAIN, {"film": "none"}, {"norm": "single", "encoding": "fourier"}], ids=str)
def test_weights_of_the_same_conditioning_are_copied_whole(settings, tmp_path):
    source, network = build(**settings), build(seed=1, **settings)
    initialise_from(network, saved(source, tmp_path / "same.safetensors"))
    state = source.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_conditionalised_network_starts_from_a_plain_one_of_its_own(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    plain = conditionalise(module, ConditioningConfig(**PLAIN), seed=0)
    plain(X, plain.condition(torch.tensor([0, 0, 1.0, 1.0])))
    network = conditionalise(module, ConditioningConfig(), seed=0)
    assert not torch.allclose(network.predict(X, 0.4), plain.predict(X, 0.4))
    initialise_from(network, saved(plain, tmp_path / "plain.safetensors"))
    torch.testing.assert_close(network.predict(X, 0.4), plain.predict(X, 0.4), rtol=1e-5, atol=1e-6)


MISFITS = {
    "missing": (lambda t: t.pop("stem.weight"), "stem.weight missing"),
    "extra": (lambda t: t.update(other=torch.zeros(2)), "other unknown"),
    "shape": (
        lambda t: t.update({"classifier.bias": torch.zeros(7)}),
        "classifier.bias is (7,), not (10,)",
    ),
    "one group of one norm": (
        lambda t: t.update({"stem_norm.weight": torch.ones(1, 16)}),
        "stem_norm.weight is (1, 16), not (2, 16)",
    ),
    "other lambdas": (
        lambda t: t["encoder.knots_K"].copy_(torch.tensor([0, 0.1, 0.2, 0.3, 0.5, 1], dtype=torch.float64)),
        "encoder.knots_K is [0, 0.1, 0.2, 0.3, 0.5, 1], not [0, 0.1, 0.2, 0.3, 0.4, 1]",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_changes(case, tmp_path):
    change, message = MISFITS[case]
    network = build(seed=1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    path = saved(build(), tmp_path / "weights.safetensors", change)
    with pytest.raises(UserError, match=rf"model.init_from='.*': does not fit: {re.escape(message)}$"):
        initialise_from(network, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_plain_weights_of_another_class_count_are_named(tmp_path):
    path = saved(build(classes=7, **PLAIN), tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=r"classifier.weight is \(7, 64\), not \(10, 64\); classifier.bias is"):
        initialise_from(build(), path)


def test_many_misfits_are_counted_in_one_line(tmp_path):
    path = saved(build("wrn10_2"), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"does not fit: ([^;]*; ){4}[^;]* and \d+ more$") as error:
        initialise_from(build(), path)
    assert "\n" not in str(error.value)


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_pickle_is_refused_and_not_run(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match=r"model.init_from: .*: damaged, or not a safetensors file"):
        initialise_from(build(), path)
    assert not (tmp_path / "sprung").exists()


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    saved(build(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model.init_from: .*: damaged, or not a safetensors file"):
        initialise_from(build(), path)


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_path_that_is_no_file_is_named(name, tmp_path):
    with pytest.raises(UserError, match=r"model.init_from: .*: cannot be read: .*name a .safetensors file"):
        initialise_from(build(), tmp_path / name)


def test_pixel_statistics_come_with_the_weights(tmp_path):
    config = Config(data=DataConfig(normalise=True))
    source = build_model(config, in_channels=3, num_classes=10, pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.2, 0.2, 0.1))
    network = build_model(config, in_channels=3, num_classes=10)
    initialise_from(network, saved(source, tmp_path / "weights.safetensors"))
    assert torch.equal(network.pixel_mean, source.pixel_mean) and torch.equal(network.pixel_std, source.pixel_std)


def test_plain_weights_start_a_network_of_several_widths_whose_other_norms_stay_at_their_start(tmp_path):
    plain = build(**PLAIN)
    config = Config(
        model=ModelConfig(widths=(0.5, 1.0), width_heads=True), conditioning=ConditioningConfig(film="shared")
    )
    network = build_model(config, in_channels=3, num_classes=10)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if ".narrow." in name}
    initialise_from(network, saved(plain, tmp_path / "plain.safetensors"))
    torch.testing.assert_close(network.predict(X, 0.3), plain.predict(X, 0.3), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
