"""Checkpoints: whole, checked, few; a stranger's file runs no code; a locked or different run is refused."""

import dataclasses
import json
import multiprocessing
import os
import pickle

import pytest
import torch

from oat_dist import runs
from oat_dist.checkpoint import CheckpointStore
from oat_dist.config import CheckpointConfig, Config, OptimConfig
from oat_dist.errors import UserError
from oat_dist.models import build_model
from oat_dist.resume import RunLock, find_unfinished
from oat_dist.weights import load_exactly, read_tensors, write_tensors


def save(store, *steps):
    for step in steps:
        store.save({"step": step, "log": {"loss": step / 3}}, {"network": {"weight": torch.full((3,), float(step))}})
    store.wait()


def test_a_checkpoint_reads_back_to_the_last_bit(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest() is None
    tensors = {
        "a": torch.randn(4, 2).to(memory_format=torch.contiguous_format).t(),
        "b": torch.tensor(3),
        "c": torch.rand(2).double(),
    }
    store.save({"step": 7, "log": {"loss": 0.1 + 0.2}}, {"network": tensors})
    store.wait()
    checkpoint = store.newest()
    assert checkpoint.step == 7 and checkpoint.state["log"] == {"loss": 0.1 + 0.2}
    again = checkpoint.tensors("network")
    assert all(torch.equal(again[k], tensors[k]) and again[k].dtype == tensors[k].dtype for k in tensors)
    assert checkpoint.tensors("averaged") is None


def test_what_is_written_is_the_state_at_the_time_of_saving(tmp_path):
    store, weight = CheckpointStore(tmp_path, keep=2), torch.zeros(1000, 1000)
    store.save({"step": 1}, {"network": {"weight": weight}})
    weight += 1
    store.wait()
    assert store.newest().tensors("network")["weight"].sum() == 0


def test_only_the_newest_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 5, 10, 15, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000015", "step_00000020"]
    assert store.newest().step == 20


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "state", "state value", "empty folder"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_both_are_named(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep=3)
    save(store, 5, 10)
    tensors, state = (tmp_path / "step_00000010" / name for name in ("network.safetensors", "state.json"))
    content = tensors.read_bytes()
    if damage == "flip":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        tensors.write_bytes(content[:-4])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "state":
        state.write_text(state.read_text()[:-5])
    elif damage == "state value":
        state.write_text(state.read_text().replace('"step": 10', '"step": 11'))
    else:
        tensors.unlink()
        state.unlink()
    with pytest.warns(UserWarning, match=r"step_00000010: damaged .*going on from step_00000005"):
        assert store.newest().step == 5


def test_when_all_checkpoints_are_damaged_nothing_is_started_over_silently(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    save(store, 5)
    (tmp_path / "step_00000005/state.json").write_text("{}")
    with pytest.raises(UserError, match=r"every checkpoint is damaged: step_00000005 .*checkpoint.resume=never"):
        store.newest()


def test_what_a_killed_process_left_half_written_is_no_checkpoint_and_is_cleaned_up(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 5)
    (tmp_path / ".step_00000010").mkdir()
    (tmp_path / ".step_00000010/network.safetensors").write_bytes(b"half")
    assert store.newest().step == 5
    save(store, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000005", "step_00000010"]


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_one_line_and_keeps_the_older(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    save(store, 5)
    before = sorted(tmp_path.rglob("*"))
    store.folder = tmp_path / "checkpoints/step_00000005/state.json"  # a file, where a folder is wanted
    store.save({"step": 10}, {"network": {"weight": torch.zeros(1)}})
    with pytest.raises(UserError, match=r"cannot write a checkpoint: .*; older ones are kept"):
        store.wait()
    assert sorted(tmp_path.rglob("*")) == before


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_place_of_tensors_is_refused_and_runs_nothing(tmp_path):
    target = str(tmp_path / "owned")
    for content in (pickle.dumps(Bomb(target)), None):
        path = tmp_path / "network.safetensors"
        if content is None:
            torch.save(Bomb(target), path)
        else:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"network.safetensors: damaged, or not a safetensors file"):
            read_tensors(path)
        assert not os.path.exists(target)
    torch.load(path.rename(tmp_path / "stranger.pt"), weights_only=False)
    assert os.path.exists(target), "the pickle of this test does what it says"


def test_extra_missing_and_wrongly_shaped_tensors_are_refused_by_name(tmp_path):
    network = build_model(Config(), in_channels=1, num_classes=10)
    good, path = network.state_dict(), tmp_path / "network.safetensors"
    wrong = {k: v for k, v in good.items() if not k.startswith("blocks.0")}
    wrong |= {"classifier.bias": torch.zeros(7), "intruder": torch.zeros(1)}
    write_tensors(wrong, path)
    with pytest.raises(UserError) as error:
        load_exactly(network, read_tensors(path)[0], path)
    said = str(error.value)
    assert "missing: blocks.0.conv1.weight" in said and "more" in said and "\n" not in said
    assert "unexpected: intruder" in said
    assert "shape: classifier.bias (7,) instead of (10,)" in said
    assert all(torch.equal(v, good[k]) for k, v in network.state_dict().items())


def unfinished(config, digits):
    return runs.create_run(config, digits, {}, 1)


def test_auto_takes_the_newest_unfinished_run_of_the_same_name_and_settings(tmp_path, digits):
    config = Config(output_dir=str(tmp_path))
    assert find_unfinished(config) is None
    first, second = unfinished(config, digits), unfinished(config, digits)
    unfinished(dataclasses.replace(config, name="other"), digits)
    unfinished(dataclasses.replace(config, seed=1), digits)
    assert find_unfinished(config) == second
    (second / "frontier.json").write_text("{}")
    assert find_unfinished(config) == first
    assert find_unfinished(dataclasses.replace(config, checkpoint=CheckpointConfig(resume="never"))) is None


def test_going_on_with_other_settings_lists_the_differing_keys(tmp_path, digits):
    run = unfinished(Config(output_dir=str(tmp_path)), digits)
    resume = CheckpointConfig(resume=str(run), keep=9)
    config = Config(output_dir=str(tmp_path), seed=3, optim=OptimConfig(lr=0.2), checkpoint=resume)
    with pytest.raises(UserError) as error:
        find_unfinished(config)
    assert "seed (0 there, 3 now), optim.lr (0.1 there, 0.2 now)" in str(error.value)
    assert find_unfinished(Config(name="renamed", checkpoint=resume)) == run


def test_a_finished_run_or_a_folder_that_is_none_is_refused(tmp_path, digits):
    run = unfinished(Config(output_dir=str(tmp_path)), digits)
    (run / "frontier.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"checkpoint.resume=.*: that run is finished"):
        find_unfinished(Config(checkpoint=CheckpointConfig(resume=str(run))))
    with pytest.raises(UserError, match=r"checkpoint.resume='nowhere': must be auto, never, or the folder of a run"):
        find_unfinished(Config(checkpoint=CheckpointConfig(resume="nowhere")))


def _try_lock(run, results):
    try:
        RunLock().take(run)
        results.put("taken")
    except UserError as error:
        results.put(str(error))


def test_a_run_folder_belongs_to_one_process_until_it_lets_go(tmp_path):
    context = multiprocessing.get_context("spawn")
    lock, results = RunLock(), context.Queue()
    lock.take(tmp_path)
    for expected in ("another process is training in this run folder", "taken"):
        other = context.Process(target=_try_lock, args=(tmp_path, results))
        other.start()
        other.join()
        assert expected in results.get(timeout=10)
        lock.release()
