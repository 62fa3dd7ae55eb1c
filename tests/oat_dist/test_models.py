"""Networks: published sizes, freezing, prediction at any lambda, initialisation."""

import pytest
import torch

from oat_dist.config import ConditioningConfig, Config, ModelConfig
from oat_dist.errors import UserError
from oat_dist.models import build_model
from oat_dist.models.film import FiLMGenerator
from oat_dist.models.norm import FiLMDualBN2d

# Small enough for every test; tests/oat_dist/test_networks.py has the others.
SMALL = ["resnet8", "wrn10_2"]
LAM = torch.tensor([0.0, 0.1, 0.25, 1.0, 0.0, 0.4], dtype=torch.float64)


def build(name="resnet8", channels=3, **conditioning):
    config = Config(model=ModelConfig(name=name), conditioning=ConditioningConfig(**conditioning))
    return build_model(config, in_channels=channels, num_classes=10)


def trained(name="resnet8", dtype=torch.float64, **conditioning):
    """A network whose running statistics and FiLM layers have moved."""
    network = build(name, **conditioning).to(dtype)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=gen, dtype=dtype))
        for _ in range(3):
            network(torch.rand(6, 3, 9, 7, generator=gen, dtype=dtype), network.condition(LAM))
    return network


def num_parameters(network) -> int:
    return sum(p.numel() for p in network.parameters())


def test_wrn10_2_has_the_published_number_of_parameters():
    assert num_parameters(build("wrn10_2")) == 499_514
    assert (
        num_parameters(build("wrn10_2", film="none", norm="single")) == 303_706
    )  # 302,778 and one norm of 464 channels


def test_resnet8_has_the_parameters_its_layers_add_up_to():
    convolutions = 3 * 16 * 9 + 2 * 16 * 16 * 9 + (16 * 32 + 32 * 32) * 9 + (32 * 64 + 64 * 64) * 9 + 16 * 32 + 32 * 64
    norms = 3 * 16 + 3 * 32 + 3 * 64
    plain = convolutions + 2 * norms + 64 * 10 + 10
    with_film = [16, 16, 16, 32, 32, 64, 64]
    film = sum(128 * 2 * c + 2 * c + 4 * c * c + 2 * c for c in with_film)
    assert num_parameters(build("resnet8", film="none", norm="single")) == plain
    assert num_parameters(build("resnet8")) == plain + 2 * norms + film


@pytest.mark.parametrize("name", SMALL)
def test_film_follows_every_norm_but_the_shortcuts_and_the_final_one(name):
    network = build(name)
    without = {path for path, m in network.named_modules() if isinstance(m, FiLMDualBN2d) and m.film is None}
    expected = {"final_norm"} if name.startswith("wrn") else {"blocks.1.shortcut_norm", "blocks.2.shortcut_norm"}
    assert without == expected


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("norm", ["dual", "single"])
@pytest.mark.parametrize("film", ["mlp", "none"])
def test_a_frozen_network_answers_as_the_network_in_evaluation_mode(name, norm, film):
    network = trained(name, norm=norm, film=film)
    x = torch.rand(6, 3, 9, 7, dtype=torch.float64)
    frozen = network.freeze(network.condition(LAM))
    in_training_mode = network.attack_logits(x, frozen)
    network.eval()
    torch.testing.assert_close(in_training_mode, network(x, network.condition(LAM)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(network.predict(x, LAM), in_training_mode, rtol=0, atol=0)


def test_an_attack_forward_has_a_graph_to_the_images_alone():
    network = trained()
    frozen = network.freeze(network.condition(LAM))
    assert not any(t.requires_grad for pair in frozen.affines for t in pair)
    x = torch.rand(6, 3, 9, 7, dtype=torch.float64)
    assert not network.attack_logits(x, frozen).requires_grad
    network.attack_logits(x.requires_grad_(True), frozen).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert x.grad.abs().sum() > 0


def test_an_attack_forward_moves_no_running_statistics():
    network = trained()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.attack_logits(torch.rand(6, 3, 9, 7, dtype=torch.float64), network.freeze(network.condition(LAM)))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_one_image_gets_the_same_logits_in_any_batch_at_any_mix_of_lambdas(name):
    network = trained(name)
    x = torch.rand(6, 3, 9, 7, dtype=torch.float64)
    together = network.predict(x, LAM)
    for i, lam in enumerate(LAM):
        torch.testing.assert_close(
            together[i : i + 1], network.predict(x[i : i + 1], float(lam)), rtol=1e-10, atol=1e-10
        )


def test_lambda_changes_the_answer_and_zero_uses_its_own_norm():
    network = trained()
    x = torch.rand(2, 3, 9, 7, dtype=torch.float64)
    answers = [network.predict(x, lam) for lam in (0.0, 0.1, 1.0)]
    assert not torch.allclose(answers[0], answers[1]) and not torch.allclose(answers[1], answers[2])
    with torch.no_grad():
        for site in network.sites:
            site.weight[0] += 1.0
    again = [network.predict(x, lam) for lam in (0.0, 0.1, 1.0)]
    assert not torch.allclose(again[0], answers[0])
    assert torch.equal(again[1], answers[1]) and torch.equal(again[2], answers[2])


@pytest.mark.parametrize("encoding", ["none", "onehot", "dct", "orthogonal", "fourier"])
def test_every_encoding_trains_its_film_generators(encoding):
    network = build(encoding=encoding, film_start="paper")
    network(torch.rand(6, 3, 8, 8), network.condition(LAM)).square().sum().backward()
    for name, parameter in network.named_parameters():
        if ".film." in name:
            assert parameter.grad.abs().sum() > 0, name


def test_an_identity_start_modulates_nothing_and_still_learns():
    film = FiLMGenerator(4, 3, "identity")
    scale, shift = film(torch.randn(5, 4))
    assert torch.equal(scale, torch.ones(5, 3)) and torch.equal(shift, torch.zeros(5, 3))
    (scale.sum() + shift.sum()).backward()
    assert film.output.weight.grad.abs().sum() > 0


def test_initialisation_follows_the_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first = build_model(Config(seed=1), in_channels=1, num_classes=10).state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = build_model(Config(seed=1), in_channels=1, num_classes=10).state_dict()
    other = build_model(Config(seed=2), in_channels=1, num_classes=10).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


@pytest.mark.parametrize("lam", [-0.1, 1.2, float("nan")])
def test_a_lambda_outside_the_unit_interval_is_refused(lam):
    with pytest.raises(UserError, match=r"lam=.*must lie in"):
        build().predict(torch.rand(1, 3, 8, 8), lam)


def test_a_joint_forward_wants_the_zeros_first():
    network = build()
    with pytest.raises(ValueError, match="must come first"):
        network.condition(torch.tensor([0.1, 0.0])).joint()
