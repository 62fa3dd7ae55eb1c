"""A run that is told to stop leaves a checkpoint of that very step and ends, later, as an undisturbed one."""

import dataclasses
import os
import pathlib
import signal
import threading

import pytest
import torch

from oat_dist.checkpoint import CheckpointStore
from oat_dist.data import TrainLoader, open_prepared
from oat_dist.distributed import World
from oat_dist.errors import PreemptedError
from oat_dist.interruption import StopSignals, stop_signals
from oat_dist.training import Training
from tests.oat_dist.test_resume import make_config, newest, run, small_root  # noqa: F401 - a fixture
from tests.ranks import run_ranks

SETTINGS = {1: {}, 2: {"zero_stage": 2, "accumulation": 2}}
"""Number of ranks -> settings of the engine."""


def stop(config, world, folder, *, stopped_at):
    """Train in a folder; the last rank is told to stop during a step. What the main rank says in the end."""
    folder.mkdir(exist_ok=True)
    data = open_prepared(config.data.root, "small")
    loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
    with stop_signals(world) as signals:
        training = Training(config, data, loader, world=world, run=folder, checkpoint=None, signals=signals)
        take_step = training._take_step

        def step(*args):
            if training.step + 1 == stopped_at and world.rank == world.ranks - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            take_step(*args)

        training._take_step = step
        with pytest.raises(PreemptedError) as stopped:
            training.fit()
    return str(stopped.value)


def undisturbed_and_stopped(world, root, folder, steps):
    """For every step to stop at: what was said, where it was left, and what differs in the end."""
    from oat_dist.engine import init_world
    from oat_dist.metrics import keep_metrics_until

    world = dataclasses.replace(init_world(threads=1), device=world.device)
    results = {}
    config = make_config(root, **SETTINGS[world.ranks])
    one = pathlib.Path(folder, "undisturbed")
    expected = run(config, world, one)
    for stopped_at in steps:
        two = pathlib.Path(folder, f"stopped {stopped_at}")
        said = stop(config, world, two, stopped_at=stopped_at)
        checkpoint = world.on_main(lambda two=two: newest(two))
        world.on_main(lambda two=two, at=checkpoint.step: keep_metrics_until(two, at))
        got = run(config, world, two, checkpoint=checkpoint)
        different = [key for key in expected if not torch.equal(expected[key], got[key])]
        if (one / "metrics.jsonl").read_bytes() != (two / "metrics.jsonl").read_bytes():
            different.append("metrics.jsonl")
        results[stopped_at] = (said, checkpoint.step, checkpoint.folder.name, different)
    return results


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_any_rank_stops_all_after_the_step_at_hand_and_the_run_ends_bit_identical(
    small_root, tmp_path, ranks  # noqa: F811
):  # fmt: skip
    within, at_the_end = 5, 6  # three steps per epoch
    for results in run_ranks(undisturbed_and_stopped, ranks, small_root, str(tmp_path), (within, at_the_end)):
        for stopped_at, (said, step, folder, different) in results.items():
            assert step == stopped_at and f"stopped at step {step} with a checkpoint" in said
            assert folder == (f"step_0000000{step}" + ("_within_epoch" if stopped_at == within else ""))
            assert not different, stopped_at


def test_outside_training_a_signal_ends_the_run_at_once_and_what_was_set_before_comes_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    for number in before:
        with pytest.raises(PreemptedError, match=f"ended by {signal.Signals(number).name}"), stop_signals(World()):
            os.kill(os.getpid(), number)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_process_that_is_leaving_is_not_killed_by_the_signal_that_follows():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(PreemptedError), stop_signals(World(), ends_process=True):
            os.kill(os.getpid(), signal.SIGUSR1)
        for number in before:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with stop_signals(World(), ends_process=True):
        pass
    assert {number: signal.getsignal(number) for number in before} == before, "a run that ends leaves them as they were"


def test_a_signal_that_comes_after_the_last_question_still_ends_the_run():
    signals = StopSignals(World())
    with pytest.raises(PreemptedError), signals.deferred():
        assert not signals.agreed()
        signals.note(signal.SIGUSR1, None)


def test_in_another_thread_no_signal_is_listened_to():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen():
        with stop_signals(World()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_checkpoint_from_within_an_epoch_takes_no_place_of_the_others_and_goes_with_the_next(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    for state in ({"step": 3}, {"step": 5, "within_epoch": True}):
        store.save(state, {"network": {"weight": torch.zeros(1)}})
    store.wait()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step_00000003", "step_00000005_within_epoch"]
    assert (store.newest().step, store.newest(whole_epochs=True).step) == (5, 3)
    store.save({"step": 6}, {"network": {"weight": torch.zeros(1)}})
    store.wait()
    assert [f.name for f in tmp_path.iterdir()] == ["step_00000006"]
