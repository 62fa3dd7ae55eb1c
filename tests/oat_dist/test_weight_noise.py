"""Weight noise (conditioning.kind=float): whose weights are noisy, how strongly, drawn when, averaged at test time."""

import dataclasses

import pytest
import torch

from oat_dist import step as step_module
from oat_dist.config import (
    AttackConfig,
    ConditioningConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
)
from oat_dist.data import evaluation_batches
from oat_dist.evaluation import EvaluationAttack, evaluate
from oat_dist.models import build_model
from oat_dist.random import draw_keys, normal
from oat_dist.report import describe
from oat_dist.robustbench import FixedLambda
from oat_dist.step import training_losses
from tests.oat_dist.test_step import disturbed, make_batch

CONDITIONING = ConditioningConfig(kind="float", film="none", lambdas=(0.0, 1.0))
LAM = torch.tensor([0, 0, 1, 1, 1], dtype=torch.float64)
KEY = draw_keys(7, "noise")


def make(draws=3, **loss) -> Config:
    return Config(
        model=ModelConfig(name="resnet8"), conditioning=CONDITIONING, loss=LossConfig(**loss),
        attack=AttackConfig(eps_255=76.5, steps=2), evaluation=EvaluationConfig(noise_draws=draws),
    )  # fmt: skip


def noisy_by_hand(network, key, lam):
    """Name -> weight + lambda * alpha * N(0, std^2)."""
    weights = {}
    for at, (name, layer) in enumerate(network.layers.items()):
        weight = layer.weight.detach()
        noise = normal(draw_keys(0, "noise of a layer", key, at), tuple(weight.shape))[0].double()
        weights[f"{name}.weight"] = weight + lam * layer.alpha.detach() * weight.std(correction=0) * noise
    return weights


def test_every_layer_has_a_noise_strength_and_nothing_else_is_added():
    plain = build_model(
        Config(conditioning=ConditioningConfig(film="none")), in_channels=1, num_classes=10
    ).state_dict()  # fmt: skip
    network = build_model(make(), in_channels=1, num_classes=10)
    added = network.state_dict().keys() - plain.keys()
    assert added == {f"{name}.alpha" for name in network.layers} and len(added) == 10
    assert all(torch.equal(layer.alpha, torch.tensor([0.25])) for layer in network.layers.values())


def test_images_with_lambda_zero_see_the_weights_and_the_others_noisy_ones():
    network, x = disturbed(make()), make_batch(5).image_NCHW
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    logits = network(x, network.condition(LAM, noise_key=KEY))
    together = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    clean = network(x[:2], network.condition(LAM[:2]))
    quiet = network.condition(LAM[2:], noise_key=KEY)
    by_hand = noisy_by_hand(network, KEY, 1.0)
    with torch.no_grad():
        for layer in network.layers.values():
            layer.alpha.zero_()
    noisy = torch.func.functional_call(network, by_hand, (x[2:], quiet))
    torch.testing.assert_close(logits, torch.cat((clean, noisy)), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(noisy, network(x[2:], network.condition(LAM[2:], noise_key=KEY)))
    for name, tensor in together.items():
        if "running_" in name:
            torch.testing.assert_close(tensor, network.state_dict()[name], rtol=0.2, atol=0.2)


def test_lambda_scales_the_noise_and_zero_has_none():
    network = disturbed(make())
    half, whole = (network.condition(torch.tensor([lam]), noise_key=KEY).noise for lam in (0.5, 1.0))
    assert all(torch.equal(2 * a, b) for a, b in zip(half, whole, strict=True))
    assert network.condition(torch.zeros(3)).noise is None
    frozen = network.freeze(network.condition(torch.tensor([0.5], dtype=torch.float64), noise_key=KEY))
    for name, weight in noisy_by_hand(network, KEY, 0.5).items():
        torch.testing.assert_close(frozen.weights[name], weight, rtol=1e-6, atol=1e-8)


def test_a_prediction_is_the_mean_of_the_probabilities_over_the_draws():
    network, x = disturbed(make(draws=3)), make_batch(4).image_NCHW
    draws = []
    for at in range(3):
        cond = network.condition(torch.full((4,), 0.6), noise_key=draw_keys(0, "noise of a measurement", at))
        draws.append(network.attack_logits(x, network.freeze(cond)).softmax(1))
    mixed = network.predict(x, torch.tensor([0.6, 0.0, 0.6, 0.0]))
    torch.testing.assert_close(mixed[::2].exp(), torch.stack(draws).mean(0)[::2], rtol=1e-10, atol=1e-10)
    clean = network.attack_logits(x, network.freeze(network.condition(torch.zeros(4))))
    torch.testing.assert_close(mixed[1::2], clean.log_softmax(1)[1::2], rtol=1e-10, atol=1e-10)
    assert torch.equal(mixed, network.predict(x, torch.tensor([0.6, 0.0, 0.6, 0.0])))


def test_the_attack_of_a_step_sees_the_noise_of_its_training_forward(monkeypatch):
    config, conditions, frozen = make(), [], []
    attack = step_module.attack_images
    monkeypatch.setattr(
        step_module, "attack_images", lambda net, told, *a, **k: frozen.append(told) or attack(net, told, *a, **k)
    )
    network = disturbed(config)

    def forward(x, cond):
        conditions.append(cond)
        return network(x, cond)

    for epoch, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        training_losses(network, make_batch(5), LAM, config=config, epoch=epoch, step=step, forward=forward)
    noisy = network.stem.used(conditions[0])["weight"]
    assert torch.equal(frozen[0].weights["stem.weight"], noisy)
    assert torch.equal(conditions[0].noise[0], conditions[1].noise[0])
    assert not torch.allclose(conditions[0].noise[0], conditions[2].noise[0])
    assert not torch.allclose(conditions[0].noise[0], conditions[3].noise[0])


@pytest.mark.parametrize("clean_at_one", [True, False])
def test_training_reaches_the_weights_and_the_strength_of_their_noise(clean_at_one):
    config = make(clean_at_one=clean_at_one)
    network = disturbed(config)
    losses = training_losses(network, make_batch(5), LAM, config=config, epoch=0, forward=network)
    assert losses.num_clean == (5 if clean_at_one else 2)
    losses.loss_N.sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in network.named_parameters() if "alpha" in n or n.endswith("weight"))


def test_weight_noise_of_several_lambdas_or_without_a_key_or_beside_clean_images_is_refused():
    network = disturbed(make())
    with pytest.raises(ValueError, match="one lambda > 0 and a key"):
        network.condition(torch.tensor([0.5, 1.0]), noise_key=KEY)
    with pytest.raises(ValueError, match="one lambda > 0 and a key"):
        network.condition(torch.ones(2))
    with pytest.raises(ValueError, match="apart"):
        network.freeze(network.condition(LAM, noise_key=KEY))
    with pytest.raises(ValueError, match="must come first"):
        network(torch.rand(2, 1, 8, 8).double(), network.condition(torch.tensor([1.0, 0.0]), noise_key=KEY))


def test_a_measurement_goes_through_the_mean_and_its_report_says_stochastic(digits):
    config = make(draws=2)
    network = build_model(config, in_channels=1, num_classes=10)
    with torch.no_grad():
        for layer in network.layers.values():
            layer.alpha.fill_(0.5)
    attack = EvaluationAttack(eps=0.1, steps=2)
    reading, cpu = DataConfig(root=str(digits.folder.parent), loader="memory"), torch.device("cpu")
    (batch,), several = (evaluation_batches(digits, "test", reading, size, device=cpu) for size in (180, 37))
    points = evaluate(network, [batch], (0.0, 0.5, 1.0), attack, seed=3)
    assert points == evaluate(network, several, (0.0, 0.5, 1.0), attack, seed=3)
    ((frozen, row),) = network.frozen_at((0.5,), seed=3)
    logits = network.attack_logits(batch.image_NCHW, frozen.for_row(row, 180))
    assert points[1]["sa"] == pytest.approx(float((logits.argmax(1) == batch.label_N).double().mean()))
    report = describe(config, digits, "test", attack, points)
    assert (report["stochastic"], report["noise_draws"]) == (True, 2)
    assert "stochastic" not in describe(Config(), digits, "test", attack, points)


def test_the_module_for_other_programs_is_the_mean_over_the_draws_and_takes_a_width():
    config = dataclasses.replace(make(draws=2), model=ModelConfig(widths=(0.5, 1.0)))
    network, x = disturbed(config), make_batch(4).image_NCHW
    expected = network.predict(x, 0.5, width=0.5)
    module = FixedLambda(network, 0.5, width=0.5)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    for at in range(len(list(module.buffers()))):
        if hasattr(module, f"frozen_{at}"):
            setattr(module, f"frozen_{at}", torch.zeros_like(module.get_buffer(f"frozen_{at}")))
    assert not module(x).allclose(expected), "the buffers, which move to a device, are what answers"
