"""The step equals the published three calls in float64, and does what it says about draws, modes and waiting."""

import dataclasses
import sys
from functools import partial

import pytest
import torch

from benchmarks.published_step import published, three_call_step
from oat_dist import step as step_module
from oat_dist.config import AttackConfig, ConditioningConfig, Config, LossConfig, ModelConfig
from oat_dist.data import Batch
from oat_dist.losses import attack_plan
from oat_dist.models import MODELS, build_model
from oat_dist.models.preact_resnet import PreActResNet
from oat_dist.random import draw_keys
from oat_dist.step import training_losses

LAMBDAS = {
    "zeros first": [0, 0, 0, 0.1, 0.2, 0.4, 1, 1, 0.3],
    "no zeros": [0.1, 0.2, 0.2, 1, 1],
    "all zeros": [0, 0, 0, 0],
    "one zero": [0, 0.4, 0.4, 1],
}


def make(model="resnet8", norm="dual", film_start="paper", **attack) -> Config:
    return Config(
        model=ModelConfig(name=model),
        conditioning=ConditioningConfig(norm=norm, film_start=film_start),
        attack=AttackConfig(eps_255=76.5, steps=3, **attack),
    )


def make_batch(num: int, *, channels: int = 1, size: int = 8, dtype=torch.float64) -> Batch:
    gen = torch.Generator().manual_seed(0)
    return Batch(
        image_NCHW=torch.rand(num, channels, size, size, generator=gen, dtype=dtype),
        label_N=torch.randint(10, (num,), generator=gen),
        index_N=torch.arange(100, 100 + num),
        position_N=torch.arange(num),
    )


def disturbed(config: Config, channels: int = 1, dtype=torch.float64):
    """A network whose norms and FiLM are not at their starting values."""
    network = build_model(config, in_channels=channels, num_classes=10).to(dtype)
    gen = torch.Generator().manual_seed(7)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if "running_var" in name:
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=gen, dtype=dtype))
        elif "running_mean" in name or ".weight" in name or ".bias" in name:
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=gen, dtype=dtype))
    return network


@pytest.mark.parametrize("lambdas", LAMBDAS.values(), ids=LAMBDAS)
@pytest.mark.parametrize("norm", ["dual", "single"])
@pytest.mark.parametrize("model", ["resnet8", "wrn10_2", "preactresnet18"])
def test_losses_gradients_and_running_statistics_equal_the_published_three_calls(model, norm, lambdas, monkeypatch):
    shrunk = partial(PreActResNet, blocks=(1, 1, 1), widths=(8, 12, 16))
    monkeypatch.setitem(MODELS, "preactresnet18", shrunk)
    config = make(model, norm)
    lam = torch.tensor(lambdas, dtype=torch.float64)
    batch = make_batch(len(lambdas))
    network = disturbed(config)
    twin = published(network)

    seen = []
    attack = step_module.attack_images
    monkeypatch.setattr(step_module, "attack_images", lambda *a, **k: seen.append(attack(*a, **k)) or seen[-1])
    ours = training_losses(network, batch, lam, config=config, epoch=0, forward=network)
    ours.loss_N.mean().backward()

    codes = network.encoder(lam)[network.encoder.rows(lam)[1]]
    theirs = three_call_step(twin, codes, batch.image_NCHW, seen[0], batch.label_N, lam)
    tolerance = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(ours.loss_N.detach(), theirs, **tolerance)

    compared = 0
    for name, module in network.named_modules():
        other = twin.get_submodule(name)
        for key, parameter in module.named_parameters(recurse=False):
            if hasattr(other, "norms"):
                grads = [getattr(n, key).grad for n in other.norms]
                expected = torch.stack([torch.zeros_like(parameter[0]) if g is None else g for g in grads])
                for statistic in ("running_mean", "running_var"):
                    by_group = torch.stack([getattr(n, statistic) for n in other.norms])
                    torch.testing.assert_close(
                        getattr(module, statistic), by_group, **tolerance, msg=f"{name}.{statistic}"
                    )
            else:
                expected = getattr(other, key).grad
            torch.testing.assert_close(parameter.grad, expected, **tolerance, msg=f"gradient of {name}.{key}")
            compared += 1
    assert compared == len(list(network.parameters()))


def test_adversarial_images_come_from_the_frozen_network_of_the_step_before():
    config = make(random_start=False)
    lam = torch.tensor([0, 0.2, 1.0, 1.0], dtype=torch.float64)
    batch, network = make_batch(4), disturbed(config)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    received = []

    def forward(x, cond):
        received.append(x)
        return network(x, cond)

    training_losses(network, batch, lam, config=config, epoch=0, forward=forward)
    network.load_state_dict(before)
    network.eval()
    x_adv = batch.image_NCHW[1:].clone()
    plan = attack_plan(config)
    for _ in range(plan.steps):
        x_adv = x_adv.detach().requires_grad_(True)
        logits = network(x_adv, network.condition(lam[1:]))
        torch.nn.functional.cross_entropy(logits, batch.label_N[1:], reduction="sum").backward()
        moved = x_adv.detach() + plan.step_size * x_adv.grad.sign()
        clean = batch.image_NCHW[1:]
        x_adv = (clean + (moved - clean).clamp(-config.attack.eps, config.attack.eps)).clamp(0, 1)
    assert torch.equal(received[0][:4], batch.image_NCHW)
    torch.testing.assert_close(received[0][4:], x_adv, rtol=0, atol=1e-12)


def test_the_step_leaves_every_module_in_training_mode():
    config, network = make(), disturbed(make())
    training_losses(network, make_batch(4), torch.tensor([0, 0.1, 1, 1]), config=config, epoch=0, forward=network)
    assert all(m.training for m in network.modules())


def test_random_starts_follow_seed_epoch_and_image_alone():
    config, network = make(), disturbed(make())
    lam = torch.tensor([0.4] * 4, dtype=torch.float64)
    batch = make_batch(4)

    def start(config, batch, epoch):
        eps_only = dataclasses.replace(config, attack=dataclasses.replace(config.attack, steps=1, step_size_255=1e-9))
        frozen = network.freeze(network.condition(lam[: len(batch.label_N)]))
        return step_module.attack_images(
            network, frozen, batch.image_NCHW, batch.label_N, batch.index_N, config=eps_only, epoch=epoch
        )

    base = start(config, batch, 0)
    fields = {f.name: getattr(batch, f.name)[2:3] for f in dataclasses.fields(batch)}
    torch.testing.assert_close(start(config, Batch(**fields), 0), base[2:3], rtol=0, atol=1e-9)
    assert not torch.allclose(start(config, batch, 1), base, atol=1e-3)
    assert not torch.allclose(start(dataclasses.replace(config, seed=5), batch, 0), base, atol=1e-3)


def test_label_smoothing_applies_to_both_terms():
    config = dataclasses.replace(make(), loss=LossConfig(label_smoothing=0.2))
    network, batch = disturbed(config), make_batch(4)
    logits = []

    def forward(x, cond):
        logits.append(network(x, cond))
        return logits[-1]

    lam = torch.tensor([0, 0.25, 0.25, 1.0], dtype=torch.float64)
    config = dataclasses.replace(config, conditioning=ConditioningConfig(lambdas=(0.0, 0.25, 1.0)))
    losses = training_losses(network, batch, lam, config=config, epoch=0, forward=forward)
    logp = logits[0].log_softmax(1)
    target = 0.8 * torch.nn.functional.one_hot(batch.label_N, 10).double() + 0.02
    clean, adversarial = -(target * logp[:4]).sum(1), -(target[1:] * logp[4:]).sum(1)
    expected = (1 - lam) * clean + torch.cat((torch.zeros(1), lam[1:] * adversarial))
    torch.testing.assert_close(losses.loss_N, expected, rtol=1e-10, atol=1e-10)


def test_bf16_runs_the_attack_under_autocast_and_gives_float32_losses():
    config = dataclasses.replace(make(), engine=dataclasses.replace(make().engine, precision="bf16"))
    network, batch = disturbed(config, dtype=torch.float32), make_batch(6, dtype=torch.float32)
    dtypes = []
    network.blocks[0].conv1.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))

    def forward(x, cond):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x, cond)

    losses = training_losses(
        network, batch, torch.tensor([0, 0.1, 0.1, 0.3, 1, 1]), config=config, epoch=0, forward=forward
    )
    assert set(dtypes) == {torch.bfloat16} and len(dtypes) == config.attack.steps + 1
    assert losses.loss_N.dtype == torch.float32
    losses.loss_N.mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters() if p.grad is not None)


def dropping(dropout=0.5, seed=0) -> Config:
    return dataclasses.replace(make("wrn10_2"), model=ModelConfig(name="wrn10_2", dropout=dropout), seed=seed)


def test_dropout_masks_follow_seed_epoch_and_images_whatever_was_drawn_before():
    network, batch = disturbed(dropping()), make_batch(6)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    lam = torch.tensor([0, 0, 0.1, 0.4, 1, 1], dtype=torch.float64)

    def losses(batch=batch, epoch=0, seed=0):
        network.load_state_dict(state)
        config = dataclasses.replace(dropping(seed=seed), attack=AttackConfig(steps=1, random_start=False))
        return training_losses(network, batch, lam, config=config, epoch=epoch, forward=network).loss_N.detach()

    first = losses()
    torch.rand(7)
    assert torch.equal(losses(), first)
    assert not torch.allclose(losses(epoch=1), first)
    assert not torch.allclose(losses(seed=1), first)
    assert not torch.allclose(losses(dataclasses.replace(batch, index_N=batch.index_N + 1)), first)


def test_the_attack_sees_no_dropout(monkeypatch):
    images = []
    for dropout in (0.0, 0.5):
        network, batch = disturbed(dropping(dropout)), make_batch(4)
        lam = torch.tensor([0, 0.1, 1, 1], dtype=torch.float64)
        training_losses(
            network, batch, lam, config=dropping(dropout), epoch=0,
            forward=lambda x, cond, network=network: images.append(x) or network(x, cond),
        )  # fmt: skip
    assert torch.equal(images[0], images[1])


def test_a_step_without_dropout_leaves_the_global_generator_alone():
    network, before = disturbed(make()), torch.get_rng_state()
    lam = torch.tensor([0, 0.1, 1, 1], dtype=torch.float64)
    training_losses(network, make_batch(4), lam, config=make(), epoch=0, forward=network)
    assert torch.equal(torch.get_rng_state(), before)


class _NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on operators that make the host wait for the values of a tensor on the (pretended) device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


KINDS = {
    "film": ConditioningConfig(),
    "shared statistics, table": ConditioningConfig(norm="shared_statistics", film="table"),
    "weight noise": ConditioningConfig(kind="float", film="none", lambdas=(0.0, 1.0)),
}


@pytest.mark.parametrize("conditioning", KINDS.values(), ids=KINDS)
def test_no_operator_of_the_step_makes_the_host_wait_for_the_device(conditioning, monkeypatch):
    # lambda stays on the host, so what depends on it is worked out before; indices are range-checked on the CPU only.
    model = ModelConfig(name="wrn10_2", dropout=0.5, widths=(0.5, 1.0))
    config = dataclasses.replace(dropping(), conditioning=conditioning, model=model)
    network, batch = disturbed(config), make_batch(4)
    lam = torch.tensor([0, 1, 1, 1], dtype=torch.float64)
    cond = network.condition(lam, width=0.5, noise_key=draw_keys(0, "any"))
    monkeypatch.setattr(type(network), "condition", lambda self, lam_N, **told: cond)
    monkeypatch.setattr(sys.modules["kernels.checks"], "_check_index", lambda *a: None)
    with _NoWaiting():
        losses = training_losses(network, batch, lam, config=config, epoch=0, forward=network, width=0.5)
        losses.loss_N.sum().backward()
    assert losses.loss_N.isfinite().all()


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits_for_it():
    config = make()
    network = disturbed(config, dtype=torch.float32).cuda()
    batch = make_batch(4, dtype=torch.float32)
    batch = dataclasses.replace(batch, image_NCHW=batch.image_NCHW.cuda(), label_N=batch.label_N.cuda())
    lam = torch.tensor([0, 0.1, 1, 1], dtype=torch.float64)
    training_losses(network, batch, lam, config=config, epoch=0, forward=network).loss_N.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_losses(network, batch, lam, config=config, epoch=0, forward=network).loss_N.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
