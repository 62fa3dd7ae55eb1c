"""What training begins with."""

import dataclasses

import pytest
import torch

from oat_dist.checkpoint import CheckpointStore
from oat_dist.config import Config, DataConfig, ModelConfig
from oat_dist.errors import UserError
from oat_dist.models import build_model
from oat_dist.trainer import open_data
from oat_dist.training import starting_network
from oat_dist.weights import write_tensors


def moved(config):
    """State of a network of other weights."""
    state = build_model(dataclasses.replace(config, seed=9), in_channels=1, num_classes=10).state_dict()
    state["encoder.codes_KE"] = state["encoder.codes_KE"].flip(0)
    return state


def same(network, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_fresh_run_begins_with_the_network_of_its_seed(digits):
    fresh = build_model(Config(), in_channels=1, num_classes=10)
    assert same(starting_network(Config(), digits, None), fresh.state_dict())


def test_init_from_gives_the_weights_and_a_checkpoint_goes_before_it(digits, tmp_path):
    given, saved = moved(Config()), {k: v + 1 for k, v in moved(Config()).items()}
    write_tensors(given, tmp_path / "given.safetensors")
    config = Config(model=ModelConfig(init_from=str(tmp_path / "given.safetensors")))
    assert same(starting_network(config, digits, None), given)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save({"step": 3}, {"network": saved})
    store.wait()
    assert same(starting_network(config, digits, store.newest()), saved)


def test_a_checkpoint_of_another_number_of_classes_is_refused_by_name(digits, tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save({"step": 3}, {"network": build_model(Config(), in_channels=1, num_classes=7).state_dict()})
    store.wait()
    with pytest.raises(UserError, match=r"network.safetensors: .*classifier.bias \(7,\) instead of \(10,\)"):
        starting_network(Config(), digits, store.newest())


def test_pixels_are_normalised_by_the_statistics_of_the_data_set_when_asked(digits):
    network = starting_network(Config(data=DataConfig(normalise=True)), digits, None)
    assert network.pixel_mean.tolist() == pytest.approx(digits.pixel_mean)
    assert network.pixel_std.tolist() == pytest.approx(digits.pixel_std)
    assert starting_network(Config(), digits, None).pixel_mean is None


def test_the_digits_are_prepared_on_first_use_and_another_set_is_not(tmp_path):
    config = Config(data=DataConfig(root=str(tmp_path / "new"), loader="memory"))
    data = open_data(config)
    assert data.counts["train"] == 1437
    stamp = (data.folder / "dataset.json").stat().st_mtime_ns
    assert (open_data(config).folder / "dataset.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"data.dataset=.svhn.: no prepared data set .*prepare_data.py svhn"):
        open_data(Config(data=DataConfig(root=str(tmp_path), dataset="svhn")))
