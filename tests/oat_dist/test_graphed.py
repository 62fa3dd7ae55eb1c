"""An attack by recordings is the attack: values, shapes, memory, and why it sometimes is not recorded."""

import dataclasses
import logging

import pytest
import torch

from oat_dist.config import AttackConfig, Config, EngineConfig, fingerprint
from oat_dist.graphed import GraphReplay, graph_replay
from oat_dist.models import build_model
from oat_dist.step import attack_images, training_losses
from tests.oat_dist.test_step import make_batch


class Again:
    """Stands for a CUDA graph on a CPU: runs the function on the static tensors, into reused memory."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        output = run()
        return lambda: output.copy_(run())


def make_config(precision="fp32", **attack) -> Config:
    return Config(
        attack=AttackConfig(**{"eps_255": 76.5, "steps": 3} | attack), engine=EngineConfig(precision=precision)
    )


def make_network(config):
    network = build_model(config, in_channels=1, num_classes=10)
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen))
    return network


def attack(network, config, lam, replay, *, epoch=0, device="cpu"):
    batch, cond = make_batch(len(lam), dtype=torch.float32), network.condition(torch.tensor(lam, dtype=torch.float64))
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else None
    image = batch.image_NCHW.contiguous(memory_format=torch.channels_last).to(device)
    return attack_images(
        network, network.freeze(cond, dtype=dtype), image, batch.label_N.to(device), batch.index_N,
        config=config, epoch=epoch, replay=replay,
    )  # fmt: skip


def change(network):
    """What an optimiser and a training forward do: everything moves, in place."""
    with torch.no_grad():
        for tensor in (*network.parameters(), *(site.running_var for site in network.sites)):
            tensor.mul_(1.05)


SETTINGS = [
    {},
    {"norm": "l2", "eps_255": 300.0},
    {"random_start": False},
    {"precision": "bf16"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_recorded_attack_equals_an_eager_one_bit_for_bit_while_weights_lambdas_and_draws_change(settings):
    config = make_config(**settings)
    network, recorder = make_network(config), Again()
    replay = GraphReplay(recorder, name="attack")
    different = []
    for epoch, lam in enumerate(([0.1, 0.4, 1, 1], [0.2, 0.2, 0.3, 1], [1, 1, 1, 1])):
        expected = attack(network, config, lam, None, epoch=epoch)
        assert torch.equal(attack(network, config, lam, replay, epoch=epoch), expected)
        different.append(expected)
        change(network)
    assert recorder.recorded == 1
    assert not torch.equal(different[0], different[1])


def test_a_whole_step_with_a_recorded_attack_is_the_step():
    config, lam = make_config(), torch.tensor([0, 0.1, 0.4, 1], dtype=torch.float64)
    losses = []
    for replay in (None, GraphReplay(Again(), name="attack")):
        network = make_network(config)
        for epoch in range(2):
            batch = make_batch(4, dtype=torch.float32)
            result = training_losses(
                network, batch, lam, config=config, epoch=epoch, forward=network, replay=replay
            )  # fmt: skip
            losses.append(result.loss_N.detach())
        assert all(module.training for module in network.modules())
    assert torch.equal(losses[0], losses[2]) and torch.equal(losses[1], losses[3])


def test_a_result_that_is_held_is_not_overwritten_by_the_next_call():
    replay = GraphReplay(Again(), name="sum")
    first = replay(lambda t: t[0] + t[1], [torch.ones(3), torch.ones(3)])
    replay(lambda t: t[0] + t[1], [torch.zeros(3), torch.zeros(3)])
    assert first.tolist() == [2, 2, 2]


def test_inputs_are_copied_so_that_theirs_may_change_or_go():
    replay = GraphReplay(Again(), name="double")
    x = torch.ones(3)
    replay(lambda t: 2 * t[0], [x])
    x.fill_(9)
    assert replay(lambda t: 2 * t[0], [torch.full((3,), 4.0)]).tolist() == [8, 8, 8]
    assert x.tolist() == [9, 9, 9]


def test_tensors_of_several_dtypes_and_layouts_are_copied_exactly():
    replay = GraphReplay(Again(), name="parts")
    tensors = [
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 4).bfloat16(),
        torch.arange(2),
        torch.arange(2, dtype=torch.int32),
    ]
    seen = []

    def function(given):
        seen.append([t.clone() for t in given])
        return given[0] * 1

    strides = [t.stride() for t in tensors]
    for _ in range(2):
        replay(function, tensors)
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], tensors, strict=True))
        assert [t.stride() for t in seen[-1]] == strides
        tensors = [t.flip(0) for t in tensors]


def test_every_combination_of_shapes_has_its_recording_up_to_a_number_and_then_says_so_once(caplog):
    recorder = Again()
    replay = GraphReplay(recorder, name="attack", most_shapes=2)
    with caplog.at_level(logging.WARNING):
        for size in (3, 4, 3, 5, 6, 4, 5):
            assert replay(lambda t: t[0] + 1, [torch.zeros(size)]).tolist() == [1.0] * size
    assert recorder.recorded == 2
    (record,) = caplog.records
    assert "engine.cuda_graph: the attack runs without a CUDA graph: shapes change from step to step" in record.message


def test_when_recording_fails_the_work_is_done_all_the_same_and_the_reason_is_said_once(caplog):
    def fails(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    replay = GraphReplay(fails, name="attack")
    with caplog.at_level(logging.WARNING):
        for size in (3, 3, 4):
            assert replay(lambda t: t[0] + 1, [torch.zeros(size)]).tolist() == [1.0] * size
    (record,) = caplog.records
    assert record.message.endswith("recording failed: operation not permitted when stream is capturing")


def test_an_error_of_the_function_is_not_hidden():
    def broken(tensors):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        GraphReplay(lambda run: run(), name="attack")(broken, [torch.zeros(1)])


def test_without_a_gpu_there_is_no_recording_and_the_log_says_why(caplog):
    with caplog.at_level(logging.INFO):
        assert graph_replay(True, torch.device("cpu"), name="attack") is None
        assert graph_replay(False, torch.device("cpu"), name="attack") is None
    (record,) = caplog.records
    assert record.message == "engine.cuda_graph: the attack runs without a CUDA graph: no GPU"


def test_a_run_goes_on_with_or_without_recordings():
    other = dataclasses.replace(Config(), engine=EngineConfig(cuda_graph=False))
    assert fingerprint(other) == fingerprint(Config())


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_on_a_gpu_a_recorded_attack_equals_an_eager_one_bit_for_bit(settings, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config = make_config(**settings)
    network = make_network(config).cuda()
    replay = graph_replay(True, torch.device("cuda", 0), name="attack")
    held = []
    with caplog.at_level(logging.WARNING):
        for epoch, lam in enumerate(([0.1, 0.4, 1, 1], [0.2, 0.2, 0.3, 1], [1, 1], [0.1, 0.1, 0.1, 0.4])):
            expected = attack(network, config, lam, None, epoch=epoch, device="cuda")
            held.append((attack(network, config, lam, replay, epoch=epoch, device="cuda"), expected))
            change(network)
    assert not caplog.records, "the attack was not recorded"
    assert len(replay._recordings) == 2
    assert all(torch.equal(got, expected) for got, expected in held)


@pytest.mark.gpu
def test_on_a_gpu_a_step_with_a_recorded_attack_never_waits():
    config, lam = make_config(), torch.tensor([0, 0.1, 0.4, 1], dtype=torch.float64)
    network, batch = make_network(config).cuda(), make_batch(4, dtype=torch.float32)
    batch = dataclasses.replace(batch, image_NCHW=batch.image_NCHW.cuda(), label_N=batch.label_N.cuda())
    replay = graph_replay(True, torch.device("cuda", 0), name="attack")

    def step():
        losses = training_losses(network, batch, lam, config=config, epoch=0, forward=network, replay=replay)
        losses.loss_N.sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replay._recordings) == 1
