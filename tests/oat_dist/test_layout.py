"""Images and convolution weights are channels last; files, values and other runs see nothing of it."""

import pytest
import torch

from oat_dist.config import Config, EngineConfig, OptimConfig
from oat_dist.distributed import World
from oat_dist.models import build_model
from oat_dist.weights import load_exactly, read_tensors, write_tensors

LAM = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=torch.float64)


def build(seed=0, **settings):
    return build_model(Config(seed=seed, **settings), in_channels=3, num_classes=10)


def convolutions(network) -> dict[str, torch.Tensor]:
    """Weights whose layout can be told: neither one pixel nor one channel."""
    named = {n: p for n, p in network.named_parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1}
    assert len(named) == 7
    return named


def is_channels_last(tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def plain(network):
    """The same network with plain contiguous weights, as sharding over ranks leaves them."""
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()
    return network


@pytest.mark.parametrize("init", ["pytorch", "kaiming"])
def test_convolutions_are_built_channels_last_with_the_values_of_plain_ones(init):
    config = Config()
    network = build(model=type(config.model)(init=init))
    assert all(is_channels_last(p) for p in convolutions(network).values())
    assert all(is_channels_last(p) for p in convolutions(network.double()).values())


def test_a_file_holds_plain_tensors_and_loads_into_either_layout(tmp_path):
    network, path = build(), tmp_path / "model.safetensors"
    write_tensors(network.state_dict(), path)
    tensors, _ = read_tensors(path)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    other = build(seed=1)
    load_exactly(other, tensors, path)
    assert all(is_channels_last(p) for p in convolutions(other).values())
    again = plain(build(seed=2))
    load_exactly(again, tensors, path)
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value) and torch.equal(again.state_dict()[name], value)
    for source, name in ((other, "other"), (again, "again")):
        write_tensors(source.state_dict(), tmp_path / name)
        assert (tmp_path / name).read_bytes() == path.read_bytes()


def test_images_are_converted_once_at_the_input_and_stay_channels_last():
    network, seen = build(), []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: seen.extend((args[0], out)))
    x = torch.rand(4, 3, 8, 8)
    network.predict(x, LAM)
    assert len(seen) == 18 and all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
    assert seen[0].data_ptr() != x.data_ptr()
    seen.clear()
    x = x.contiguous(memory_format=torch.channels_last)
    network.predict(x, LAM)
    assert seen[0].data_ptr() == x.data_ptr(), "an image that is right already is not copied"


def test_either_layout_of_weights_and_images_gives_the_same_answers():
    network, other = build().double(), plain(build().double())
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    expected = network.predict(x, LAM)
    for net, images in ((other, x), (network, x.contiguous(memory_format=torch.channels_last))):
        torch.testing.assert_close(net.predict(images, LAM), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_network_is_channels_last_whatever_its_parameters_are(dtype):
    network = plain(build())
    frozen = network.freeze(network.condition(LAM), dtype=dtype)
    for name in convolutions(network):
        assert is_channels_last(frozen.weights[name])
        assert torch.equal(frozen.weights[name], network.get_parameter(name).to(dtype or torch.float32))
    assert all(w.dtype == (dtype or torch.float32) for w in frozen.weights.values())
    assert all(t.dtype == torch.float32 for pair in frozen.affines for t in pair)


def test_freezing_copies_no_weight_that_is_right_already():
    network = build()
    frozen = network.freeze(network.condition(LAM))
    assert all(w.data_ptr() == network.get_parameter(name).data_ptr() for name, w in frozen.weights.items())


@pytest.mark.dist
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_optimiser_state_comes_back_in_the_layout_of_its_parameters(zero_stage):
    from tests.ranks import run_ranks

    assert run_ranks(restored_layouts, 1, zero_stage) == [True]


def restored_layouts(world: World, zero_stage: int) -> bool:
    """Whether state that was saved plain is laid out like the parameters, with its values."""
    from oat_dist.engine import Engine, init_world

    init_world(threads=1)
    config = Config(engine=EngineConfig(zero_stage=zero_stage), optim=OptimConfig(batch_size=4))
    network = build()
    engine = Engine(network, config, world)
    gen = torch.Generator().manual_seed(0)
    state = {f"{n}/momentum_buffer": torch.randn(p.shape, generator=gen) for n, p in network.named_parameters()}
    engine.load_optimizer_state(state)
    got = engine.optimizer_state()
    assert got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in state)
    assert all(is_channels_last(p) == (zero_stage == 0) for p in convolutions(network).values())
    return all(got[f"{n}/momentum_buffer"].stride() == p.stride() for n, p in network.named_parameters())
