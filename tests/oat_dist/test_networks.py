"""The published networks: sizes, places of FiLM, freezing; and the settings of a network: dropout, start, pixels."""

import pytest
import torch

from oat_dist.config import ConditioningConfig, Config, DataConfig, ModelConfig
from oat_dist.errors import UserError
from oat_dist.models import MODELS, build_model
from oat_dist.models.norm import FiLMDualBN2d

# Conditional (encoding width 128, FiLM, dual norm), plain; 10 classes, 3 channels. The first three are published;
# the others follow from 4 C^2 + 260 C numbers per FiLM of C channels and 2 C per norm and group.
SIZES = {
    "resnet34": (33_355_466, 21_282_122),
    "wrn16_8": (16_228_922, 10_961_370),
    "wrn40_2": (3_886_394, 2_243_546),
    "resnet18": (17_785_546, 11_173_962),
    "preactresnet18": (16_600_266, 11_172_170),
    "wrn28_10": (54_230_330, 36_479_194),
    "wrn34_10": (68_799_290, 46_160_474),
}
LAM = torch.tensor([0.0, 0.25], dtype=torch.float64)


def build(name, data=None, channels=3, model=None, **options):
    config = Config(data=data or DataConfig(), model=ModelConfig(name=name, **(model or {})), **options)
    return build_model(config, in_channels=channels, num_classes=10)


def num_parameters(network) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.fixture(scope="module", params=SIZES)
def large(request):
    """Name and network, built once for the tests below that only look at it."""
    return request.param, build(request.param, conditioning=ConditioningConfig(film_start="paper"))


def test_every_network_is_tested():
    assert {*SIZES, "resnet8", "wrn10_2"} == set(MODELS)


def test_the_conditional_network_has_the_expected_number_of_parameters(large):
    name, network = large
    assert num_parameters(network) == SIZES[name][0]


@pytest.mark.parametrize("name", SIZES)
def test_the_plain_network_has_the_expected_number_of_parameters(name):
    assert num_parameters(build(name, conditioning=ConditioningConfig(film="none", norm="single"))) == SIZES[name][1]


def test_film_is_left_out_at_the_shortcuts_norms_and_the_final_one_alone(large):
    name, network = large
    without = {path for path, m in network.named_modules() if isinstance(m, FiLMDualBN2d) and m.film is None}
    if name.startswith("resnet"):
        assert without == {path for path, _ in network.named_modules() if path.endswith("shortcut_norm")}
        assert len(without) == 3
    else:
        assert without == {"final_norm"}


def test_a_frozen_network_answers_as_the_network_in_evaluation_mode_at_two_image_sizes(large):
    _, network = large
    with torch.no_grad():
        network.train()(torch.rand(2, 3, 8, 8), network.condition(LAM))
        for size in ((8, 8), (12, 9)):
            x = torch.rand(2, 3, *size)
            frozen = network.train().attack_logits(x, network.freeze(network.condition(LAM)))
            expected = network.eval()(x, network.condition(LAM))
            torch.testing.assert_close(frozen, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_dropout_comes_after_the_second_activation_in_training_alone():
    plain, network = build("wrn10_2"), build("wrn10_2", model={"dropout": 0.25})
    network.load_state_dict(plain.state_dict())
    x, seen = torch.rand(8, 3, 16, 16), []
    for net in (plain, network):
        net.blocks[0].conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        net(x, net.condition(torch.full((8,), 0.1)))
    kept = seen[1] != 0
    torch.testing.assert_close(seen[1][kept], seen[0][kept] / 0.75)
    active = seen[0] != 0
    assert float((active & ~kept).sum() / active.sum()) == pytest.approx(0.25, abs=0.01)
    network.load_state_dict(plain.state_dict())
    assert network.training and torch.equal(network.predict(x, 0.1), plain.predict(x, 0.1))
    assert torch.equal(
        network.eval()(x, network.condition(LAM.repeat(4))), plain.eval()(x, plain.condition(LAM.repeat(4)))
    )


def test_the_kaiming_start_has_the_spread_of_he_and_leaves_film_alone():
    started, default = build("wrn10_2", model={"init": "kaiming"}), build("wrn10_2")
    for block in started.blocks[1:]:
        fan_out = block.conv2.out_channels * 9
        assert float(block.conv2.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    assert torch.equal(started.classifier.bias, torch.zeros(10))
    film = "blocks.0.norm1.film.hidden.weight"
    assert torch.equal(started.get_parameter(film), default.get_parameter(film))
    assert torch.equal(started.classifier.weight, default.classifier.weight)
    again = build("wrn10_2", model={"init": "kaiming"})
    assert torch.equal(started.stem.weight, again.stem.weight)


def normalising(mean=None, std=None):
    config = Config(data=DataConfig(normalise=True))
    return build_model(config, in_channels=3, num_classes=10, pixel_mean=mean, pixel_std=std)


def test_pixels_are_normalised_inside_the_network_and_the_state_carries_the_statistics():
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.125)
    network, plain = normalising(mean, std), build("resnet8")
    x = torch.rand(2, 3, 8, 8)
    normal = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(network.predict(x, LAM), plain.predict(normal, LAM))
    rebuilt = normalising()
    assert torch.equal(rebuilt.predict(x, LAM), plain.predict(x, LAM))
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(rebuilt.predict(x, LAM), network.predict(x, LAM))


def test_without_normalisation_the_state_has_no_pixel_statistics():
    config = Config()
    network = build_model(config, in_channels=3, num_classes=10, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3)
    assert not [name for name in network.state_dict() if "pixel" in name]


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [((0.5,), (0.2,), "data.normalise=True: 1 means, 1 deviations, 3 channels"),
     ((0.5, 0.5, 0.5), (0.2, 0.0, 0.2), "expected finite means, deviations > 0"),
     ((float("nan"), 0.5, 0.5), (0.2, 0.2, 0.2), "expected finite means, deviations > 0")],
)  # fmt: skip
def test_pixel_statistics_that_cannot_be_used_are_refused(mean, std, message):
    with pytest.raises(UserError, match=message):
        normalising(mean, std)


def test_a_site_knows_its_name_in_the_network():
    network = build_model(Config(), in_channels=1, num_classes=10)
    assert all(network.get_submodule(site.name) is site for site in network.sites)
