"""A step of every objective: against separate calls, other operators, finite differences, DeepSpeed, special cases."""

import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks.published_step import Told, published
from kernels import film_dual_bn_reference
from oat_dist import step as step_module
from oat_dist.attacks import ascend
from oat_dist.config import AttackConfig, Config, EngineConfig, LossConfig, OptimConfig
from oat_dist.distributed import World
from oat_dist.losses import ROBUST, Examples, attack_plan
from oat_dist.models import norm as norm_module
from oat_dist.optim import build_optimizer
from oat_dist.random import draw_keys
from oat_dist.step import training_losses
from tests.oat_dist.test_objective_passes import data_of
from tests.oat_dist.test_step import _NoWaiting, disturbed, make, make_batch

LAM = torch.tensor([0, 0, 0.1, 0.4, 1, 1, 0.4], dtype=torch.float64)
A = slice(2, None)
DIFFERENTIATED = ("llr", "grad_align")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def make_config(name: str, norm="dual", eps_255=30.0, **loss) -> Config:
    """A short attack, where the number of steps is open."""
    steps = None if ROBUST[name].attack.single_step or ROBUST[name].attack.steps == 0 else 1
    attack = AttackConfig(eps_255=eps_255, steps=steps)
    return dataclasses.replace(make(norm=norm), data=data_of(name), attack=attack, loss=LossConfig(robust=name, **loss))


def a_step(config: Config, network=None, dtype=torch.float64):
    network = disturbed(config, dtype=dtype) if network is None else network
    batch = make_batch(len(LAM), dtype=dtype)
    return network, batch, training_losses(network, batch, LAM, config=config, epoch=0, forward=network)


@pytest.fixture
def images(monkeypatch) -> dict:
    """The adversarial and noisy images of the last step."""
    seen = {}
    for name, function in (("adversarial", "attack_images"), ("noisy", "noisy_images")):
        made = getattr(step_module, function)
        keep = lambda *a, _made=made, _name=name, **k: seen.setdefault(_name, _made(*a, **k))  # noqa: E731
        monkeypatch.setattr(step_module, function, keep)
    return seen


@pytest.mark.parametrize("norm", ["dual", "single"])
@pytest.mark.parametrize("name", ROBUST)
def test_a_step_equals_separate_calls_of_the_published_network(name, norm, images):
    network = disturbed(make_config(name, norm))
    twin = published(network)
    _, batch, ours = a_step(make_config(name, norm), network)
    ours.loss_N.mean().backward()

    codes = network.encoder(LAM)[network.encoder.rows(LAM)[1]]
    x, label = batch.image_NCHW, batch.label_N
    views = {
        key: image.clone().requires_grad_(key != "adversarial") for key, image in {"clean": x[A], **images}.items()
    }
    clean = torch.cat((x[:2], views["clean"]))
    if name == "llr":  # one function of the image: one call
        both = twin._features(torch.cat((clean, views["adversarial"])), Told(torch.cat((codes, codes[A])), 2))
        features = dict(zip(("clean", "adversarial"), both.split((7, 5)), strict=True))
    else:
        calls = {"clean": (clean, codes, 2), **{key: (views[key], codes[A], 0) for key in images}}
        features = {key: twin._features(image, Told(code, zeros)) for key, (image, code, zeros) in calls.items()}
    logits = {key: twin.classifier(value, Told(codes, 2)) for key, value in features.items()}
    clean_A = F.cross_entropy(logits["clean"], label, reduction="none")
    fields = {f"{key}_logits_AK": value[-5:] for key, value in logits.items()}
    fields |= {f"{key}_features_AF": value[-5:] for key, value in features.items() if key != "noisy"}
    fields |= {f"{key}_image_ACHW": value.detach() for key, value in views.items()}
    if name in DIFFERENTIATED:
        total = sum(F.cross_entropy(logits[k][-5:], label[A], reduction="sum") for k in views if k != "adversarial")
        wanted = {key: image for key, image in views.items() if image.requires_grad}
        gradients = torch.autograd.grad(total, wanted.values(), create_graph=True)
        fields |= {f"{key}_gradient_ACHW": g for key, g in zip(wanted, gradients, strict=True)}
    robust_A = ROBUST[name].loss(Examples(label_A=label[A], settings=ROBUST[name].settings, **fields))
    theirs = torch.cat((clean_A[:2], (1 - LAM[A]) * clean_A[A] + LAM[A] * robust_A))
    theirs.mean().backward()

    torch.testing.assert_close(ours.loss_N, theirs, **EXACT)
    for module_name, module in network.named_modules():
        other = twin.get_submodule(module_name)
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.testing.assert_close(module.weight.grad, other.weight.grad, **EXACT, msg=module_name)
        elif hasattr(other, "norms"):
            for key in ("running_mean", "running_var"):
                theirs = torch.stack([getattr(n, key) for n in other.norms])
                torch.testing.assert_close(getattr(module, key), theirs, **EXACT, msg=f"{module_name}.{key}")


@pytest.mark.parametrize("norm", ["dual", "single"])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_second_derivatives_of_the_fused_operator_are_those_of_the_reference(name, norm, monkeypatch):
    def reference(*args, sync, site, **kwargs):
        return film_dual_bn_reference(*args, **kwargs)

    config, gradients = make_config(name, norm), []
    for operator in (norm_module.film_dual_bn, reference):
        monkeypatch.setattr(norm_module, "film_dual_bn", operator)
        network, _, step = a_step(config)
        step.loss_N.mean().backward()
        gradients.append({key: p.grad for key, p in network.named_parameters()})
    assert any("film" in key for key in gradients[0])
    for key, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][key], **EXACT, msg=key)


@pytest.mark.parametrize("name", [*DIFFERENTIATED, "mart", "tla"])
def test_gradients_of_a_step_to_weights_are_those_of_finite_differences(name, monkeypatch):
    config = make_config(name)
    network, batch, _ = a_step(config)
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fixed = (batch.image_NCHW[A] + 0.1 * noise).clamp(0, 1)
    monkeypatch.setattr(step_module, "attack_images", lambda *a, **k: fixed)
    parameters = [
        network.stem.weight,
        network.stem_norm.bias,
        network.blocks[1].conv2.weight,
        network.classifier.weight,
    ]
    total = a_step(config, network)[2].loss_N.sum()
    for parameter, grad in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
        # So small that no ReLU turns on or off between the two sides, where input gradients jump.
        at, h = grad.abs().flatten().argmax(), 1e-7
        with torch.no_grad():
            at = torch.unravel_index(at, parameter.shape)
            value, sides = parameter[at].clone(), []
            for side in (h, -h):
                parameter[at] = value + side
                with torch.enable_grad():
                    sides.append(a_step(config, network)[2].loss_N.sum().item())
            parameter[at] = value
        assert (sides[0] - sides[1]) / (2 * h) == pytest.approx(grad[at].item(), rel=1e-5)


@pytest.mark.parametrize(("norm", "precision"), [("dual", "fp32"), ("dual", "bf16"), ("single", "bf16")])
@pytest.mark.parametrize("name", ROBUST)
def test_losses_and_gradients_are_finite_in_either_precision(name, norm, precision):
    config = dataclasses.replace(make_config(name, norm), engine=EngineConfig(precision=precision))
    network, batch = disturbed(config, dtype=torch.float32), make_batch(len(LAM), dtype=torch.float32)

    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return network(*args, **kwargs)

    losses = training_losses(network, batch, LAM, config=config, epoch=0, forward=forward)
    assert losses.loss_N.dtype == torch.float32 and losses.loss_N.isfinite().all()
    losses.loss_N.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", ROBUST)
def test_a_micro_batch_without_attacked_images_is_clean_training(name):
    config = make_config(name)
    network, batch = disturbed(config), make_batch(3)
    logits = []
    network.classifier.register_forward_hook(lambda module, args, output: logits.append(output))
    lam = torch.zeros(3, dtype=torch.float64)
    step = training_losses(network, batch, lam, config=config, epoch=0, forward=network)
    torch.testing.assert_close(step.loss_N, F.cross_entropy(logits[0], batch.label_N, reduction="none"), **EXACT)
    step.loss_N.sum().backward()
    assert network.stem.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["trades", "mart", "llr", "grad_align"])
def test_no_operator_of_an_objective_makes_the_host_wait(name, monkeypatch):
    config = make_config(name)
    network, batch = disturbed(config), make_batch(len(LAM))
    cond = network.condition(LAM)
    monkeypatch.setattr(type(network), "condition", lambda self, lam_N, **told: cond)
    monkeypatch.setattr(sys.modules["kernels.checks"], "_check_index", lambda *a: None)
    with _NoWaiting():
        losses = training_losses(network, batch, LAM, config=config, epoch=0, forward=network)
        losses.loss_N.sum().backward()


def clean_losses(config: Config) -> torch.Tensor:
    """Clean cross-entropies of a step."""
    network, batch, logits = disturbed(config), make_batch(len(LAM)), []
    network.classifier.register_forward_hook(lambda module, args, output: logits.append(output))
    training_losses(network, batch, LAM, config=config, epoch=0, forward=network)
    return F.cross_entropy(logits[-1][: len(LAM)], batch.label_N, reduction="none").detach()


@pytest.mark.parametrize(
    ("name", "settings"), [("trades", {"beta": 0.0}), ("llr", {"weight": 0.0}),
                           ("llr", {"linearity": 0.0, "gradient": 0.0}), ("fgsm", {"alpha": 1.0})],
)  # fmt: skip
def test_an_objective_without_its_weight_is_standard_training_at_every_lambda(name, settings):
    config = make_config(name, settings=settings)
    torch.testing.assert_close(a_step(config)[2].loss_N, clean_losses(config), **EXACT)


@pytest.mark.parametrize(("name", "weight"), [("trades", "beta"), ("llr", "weight")])
def test_lambda_may_drive_the_weight_of_an_objective(name, weight):
    config = make_config(name, condition_on=weight)
    clean, robust = clean_losses(config), a_step(make_config(name))[2]
    # What mixing gives is clean + lambda (L_a - clean), and L_a is clean + weight * rest: the same here.
    driven = a_step(config)[2].loss_N
    torch.testing.assert_close(driven, robust.loss_N, **EXACT)
    torch.testing.assert_close(driven[:2], clean[:2], **EXACT)
    twice = a_step(make_config(name, condition_on=weight, settings={weight: 2 * ROBUST[name].settings[weight]}))[2]
    torch.testing.assert_close(twice.loss_N - clean, 2 * (driven - clean), **EXACT)


def test_single_step_methods_without_their_extras_are_min_max_training():
    base = a_step(make_config("min_max"))[2].loss_N
    no_start = dataclasses.replace(make_config("fgsm_rs").attack, random_start=False)
    for config in (
        make_config("fgsm", settings={"alpha": 0.0}),
        dataclasses.replace(make_config("fgsm_rs"), attack=no_start),
        dataclasses.replace(make_config("pgd_at"), attack=AttackConfig(eps_255=30, steps=1, step_size_255=30,
                                                                        random_start=False)),
    ):  # fmt: skip
        torch.testing.assert_close(a_step(config)[2].loss_N, base, **EXACT)


@pytest.mark.parametrize("norm", ["dual", "single"])
def test_local_linearity_in_a_ball_of_radius_zero_is_standard_training(norm):
    # With statistics of their own the same images would differ, as soon as some clean ones have lambda = 0.
    config = make_config("llr", norm, eps_255=0.0)
    torch.testing.assert_close(a_step(config)[2].loss_N, clean_losses(config), **EXACT)


GEN = torch.Generator().manual_seed(1)
X = 0.2 + 0.6 * torch.rand(6, 1, 2, 3, generator=GEN, dtype=torch.float64)
LABEL = torch.tensor([0, 1, 2, 0, 1, 2])
WEIGHT = torch.randn(3, 6, generator=GEN, dtype=torch.float64)
KEY = draw_keys(0, "test", torch.arange(6))


def bent(x):
    return torch.tanh(x.flatten(1) @ WEIGHT.T) * 3


def attacked(name: str, logits_fn=bent, eps=0.1, **attack) -> tuple[torch.Tensor, torch.Tensor]:
    """(start, last iterate) of the attack of an objective."""
    plan = attack_plan(Config(loss=LossConfig(robust=name), attack=AttackConfig(eps_255=255 * eps, **attack)))
    start = plan.first_iterate(X, KEY)
    return start, ascend(logits_fn, X, start, LABEL, plan)


def gradient(x) -> torch.Tensor:
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(bent(x), LABEL, reduction="sum"), x)[0]


@pytest.mark.parametrize("name", ["fgsm", "min_max", "grad_align"])
def test_one_step_from_the_image_goes_to_the_border_of_the_ball(name):
    start, x_adv = attacked(name)
    assert torch.equal(start, X)
    torch.testing.assert_close(x_adv, X + 0.1 * gradient(X).sign(), rtol=0, atol=1e-12)
    unit = gradient(X) / gradient(X).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(attacked(name, norm="l2")[1], X + 0.1 * unit, rtol=0, atol=1e-12)


def test_fgsm_from_a_random_start_steps_further_and_comes_back():
    start, x_adv = attacked("fgsm_rs")
    expected = X + (start + 0.125 * gradient(start).sign() - X).clamp(-0.1, 0.1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert 0.09 < (start - X).abs().max() <= 0.1


def test_noisy_fgsm_starts_far_away_and_does_not_come_back():
    start, x_adv = attacked("n_fgsm")
    torch.testing.assert_close(x_adv, (start + 0.1 * gradient(start).sign()).clamp(0, 1), rtol=0, atol=1e-12)
    assert 0.18 < (start - X).abs().max() <= 0.2 and 0.2 < (x_adv - X).abs().max() <= 0.3 + 1e-12


def test_the_attack_of_local_linearity_is_its_definition_written_out():
    start, x_adv = attacked("llr", steps=3)
    centre, slope, expected = F.cross_entropy(bent(X), LABEL, reduction="none"), gradient(X), start
    for _ in range(3):
        expected = expected.detach().requires_grad_(True)
        linear = centre + ((expected - X) * slope).sum((1, 2, 3))
        far = (F.cross_entropy(bent(expected), LABEL, reduction="none") - linear).abs()
        (grad,) = torch.autograd.grad(far.sum(), expected)
        expected = X + (expected.detach() + (0.1 + 4 / 255) / 3 * grad.sign() - X).clamp(-0.1, 0.1)
    torch.testing.assert_close(x_adv, expected.clamp(0, 1), rtol=0, atol=1e-12)


def test_the_attack_of_trades_is_exact_in_float64():
    x_adv = attacked("trades", steps=1, step_size_255=25.5)[1]
    start = attacked("trades")[0].requires_grad_(True)
    clean = bent(X).log_softmax(1)
    (grad,) = torch.autograd.grad((clean.exp() * (clean - bent(start).log_softmax(1))).sum(), start)
    torch.testing.assert_close(x_adv, X + (start + 0.1 * grad.sign() - X).clamp(-0.1, 0.1), rtol=0, atol=1e-12)


@pytest.mark.dist
def test_a_step_under_deepspeed_is_the_step_without_it():
    from tests.ranks import run_ranks

    (differences,) = run_ranks(steps_under_deepspeed, 1)
    assert len(differences) == 6
    assert all(d < 1e-5 for d in differences.values()), differences


def steps_under_deepspeed(world: World) -> dict[str, float]:
    """Largest difference of any weight after one step, by objective and ZeRO stage."""
    from oat_dist.engine import Engine, init_world

    init_world(threads=1)
    differences = {}
    for name in ("llr", "tla", "grad_align"):
        for stage in (0, 2):
            base = make_config(name)
            optim = OptimConfig(batch_size=len(LAM), lr=0.1)
            config = dataclasses.replace(base, engine=EngineConfig(zero_stage=stage), optim=optim)
            network, plain = (disturbed(config, dtype=torch.float32) for _ in range(2))
            engine, batch = Engine(network, config, world), make_batch(len(LAM), dtype=torch.float32)
            step = training_losses(network, batch, LAM, config=config, epoch=0, forward=engine.forward)
            engine.backward_and_step(step.loss_N, lr=optim.lr)
            optimizer = build_optimizer(plain, optim)
            a_step(config, plain, dtype=torch.float32)[2].loss_N.mean().backward()
            before = plain.stem.weight.detach().clone()
            optimizer.step()
            assert not torch.equal(before, plain.stem.weight)
            pairs = zip(network.parameters(), plain.parameters(), strict=True)
            differences[f"{name}, stage {stage}"] = max((a - b).abs().max().item() for a, b in pairs)
    return differences
