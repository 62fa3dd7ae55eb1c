"""Catastrophic overfitting is found, undone and outlived; without the guard nothing changes."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from oat_dist.checkpoint import CheckpointStore
from oat_dist.config import (
    AttackConfig,
    CheckpointConfig,
    ConditioningConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimConfig,
    fingerprint,
)
from oat_dist.config_io import load_config
from oat_dist.data import prepare
from oat_dist.errors import UserError
from oat_dist.guard import Collapse, guard_action, has_collapsed, read_collapse
from oat_dist.losses import ROBUST, AttackDefaults, Objective, attack_plan
from oat_dist.losses.pgd_at import pgd_at_loss
from oat_dist.resume import rewind
from tests.ranks import run_ranks

STEPS, EPOCHS, BATCH = 10, 3, 32  # steps of an epoch
TOY = Objective(
    name="toy",
    source="for this test",
    loss=pgd_at_loss,
    attack=AttackDefaults(steps=1, step_share=1.25, start="none", single_step=True),
)


@pytest.fixture
def toy(monkeypatch):
    """The toy objective is registered for one test."""
    monkeypatch.setitem(ROBUST, "toy", TOY)


SIZES = {"drop": 0.5, "num_images": 256, "num_classes": 10}
# Guessing: 0.1, and three deviations 3 sqrt(0.1 * 0.9 / 256) = 0.05625 more.


@pytest.mark.parametrize(
    ("ra", "best", "settings", "expected"),
    [
        (0.19, 0.4, {}, True),
        (0.2, 0.4, {}, False),  # exactly half is left
        (0.0, 0.157, {}, True),
        (0.0, 0.156, {}, False),  # guessing explains the best
        (0.3, 0.4, {"drop": 0.2}, True),
        (0.0, 0.4, {"num_images": 9}, False),  # three deviations: 0.3
        (0.0, 0.58, {"num_classes": 2}, False),  # 0.5 + 0.09375
        (0.0, float("-inf"), {}, False),
    ],
)
def test_a_collapse_loses_the_share_of_a_best_that_guessing_does_not_explain(ra, best, settings, expected):
    assert has_collapsed(ra, best, **SIZES | settings) is expected


def config_of(robust="toy", guard="auto", lambdas=(0.0, 1.0), **attack):
    conditioning = ConditioningConfig(lambdas=lambdas, film="none", norm="single")
    return Config(loss=LossConfig(robust=robust), attack=AttackConfig(guard=guard, **attack), conditioning=conditioning)


def test_auto_guards_single_step_methods_that_attack_something(toy):
    assert guard_action(config_of()) == "switch"
    assert guard_action(config_of("pgd_at")) == guard_action(config_of("pgd_at", steps=1)) == "none"
    assert guard_action(config_of("pgd_at", guard="stop")) == "stop"
    assert guard_action(config_of(guard="none")) == "none"
    assert guard_action(config_of(lambdas=(0.0,))) == guard_action(config_of(guard="stop", lambdas=(0.0,))) == "none"


def test_after_a_switch_the_attack_is_that_of_pgd_at_in_the_same_ball(toy):
    ours = config_of(norm="l2", eps_255=128, step_size_255=300, random_start=False)
    assert attack_plan(ours).steps == 1 and attack_plan(ours).start == "none"
    expected = attack_plan(config_of("pgd_at", norm="l2", eps_255=128))
    assert attack_plan(ours, multi_step=True) == expected
    assert (expected.steps, expected.start, expected.project) == (7, "uniform", True)


@pytest.mark.parametrize(
    ("argument", "message"),
    {
        "--attack.guard=maybe": "attack.guard=maybe: expected one of auto, switch, stop, none",
        "--attack.guard_images=0": "attack.guard_images=0: must be at least 1",
        "--attack.guard_drop=0": "attack.guard_drop=0.0: must lie in (0, 1)",
        "--attack.guard_drop=1": "attack.guard_drop=1.0: must lie in (0, 1)",
    }.items(),
)
def test_a_guard_out_of_range_is_one_line_that_names_the_key(argument, message):
    with pytest.raises(UserError) as error:
        load_config([argument])
    assert str(error.value) == message


def test_the_fingerprint_follows_the_guard():
    attacks = [{}, {"guard": "none"}, {"guard_images": 100}, {"guard_drop": 0.4}]
    assert len({fingerprint(Config(attack=AttackConfig(**attack))) for attack in attacks}) == 4


def test_a_data_set_without_validation_is_refused_by_name_unless_the_guard_is_off(toy, digits, tmp_path):
    from oat_dist.trainer import open_data

    shutil.copytree(digits.folder, tmp_path / "digits")
    about = json.loads((tmp_path / "digits/dataset.json").read_text())
    about["counts"]["val"] = 0
    (tmp_path / "digits/dataset.json").write_text(json.dumps(about))
    data = DataConfig(root=str(tmp_path), loader="memory")
    with pytest.raises(UserError, match=r"^attack.guard='auto': measures the validation split, which data set digits"):
        open_data(dataclasses.replace(config_of(), data=data))
    assert open_data(dataclasses.replace(config_of(guard="none"), data=data)).counts["val"] == 0


COLLAPSE = Collapse(epoch=3, step=45, ra_before=0.4, ra_after=0.0, restored_step=30, action="switch")


@pytest.mark.parametrize(("step", "stays"), [(15, False), (30, True), (45, True)])
def test_a_run_that_goes_on_from_before_a_collapse_has_it_still_to_come(tmp_path, step, stays):
    (tmp_path / "guard.json").write_text(json.dumps(dataclasses.asdict(COLLAPSE)))
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save({"step": step}, {"network": {"weight": torch.ones(1)}})
    assert store.newest().step == rewind(tmp_path, keep=1).step == step
    assert read_collapse(tmp_path) == (COLLAPSE if stays else None)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "guard.json").write_text('{"epoch": 3}')
    with pytest.raises(UserError, match=r"guard.json: damaged; start anew with checkpoint.resume=never"):
        read_collapse(tmp_path)


@pytest.fixture(scope="module")
def some_root(digits, tmp_path_factory):
    """A folder with the first 320 training digits, and some to measure, as the data set `some`."""
    root = tmp_path_factory.mktemp("some")
    arrays = {}
    for split, count in (("train", STEPS * BATCH), ("val", 180), ("test", 90)):
        tensors = load_file(digits.file(split, "memory"))
        arrays |= {f"x_{split}": tensors["image"][:count], f"y_{split}": tensors["label"][:count]}
    np.savez(root / "some.npz", **arrays)
    prepare(str(root), f"npz:{root / 'some.npz'}")
    return str(root)


def make_config(root, output_dir, *, guard="auto", validate=0, **settings) -> Config:
    """A dedicated network of lambda = 1; `guard_images` is left at more than there are."""
    return Config(
        output_dir=str(output_dir),
        data=DataConfig(root=root, dataset="some", loader="memory", shift_pixels=0, flip=False),
        conditioning=ConditioningConfig(lambdas=(1.0,), film="none", norm="single"),
        loss=LossConfig(robust="toy"),
        attack=AttackConfig(eps_255=38, guard=guard),
        optim=OptimConfig(batch_size=BATCH, lr=0.1, epochs=EPOCHS, schedule="constant", ema_decay=0.5),
        evaluation=EvaluationConfig(lambdas=(1.0,), steps=5, interval_epochs=validate),
        logging=dataclasses.replace(Config().logging, interval_steps=5, tensorboard=False),
        **settings,
    )


def spoil(training) -> None:
    """After its first epoch the single-step attack makes images far too easy, and the network unlearns robustness.

    It stands for a collapse: single steps of this size do not collapse by themselves on images so few and simple.
    """
    ROBUST["toy"] = TOY
    honest = training.training_losses

    def losses(*args, plan, epoch, **settings):
        if epoch >= 1 and plan.steps == 1:
            plan = dataclasses.replace(plan, eps=0.5, step_size=-0.5)
        return honest(*args, plan=plan, epoch=epoch, **settings)

    training.training_losses = losses


def snapshots_at(training, places, folder) -> None:
    """Before the steps (attack steps, step) of `places`, once, copy the run to `folder`/NAME as a kill leaves it."""
    take_step = training.Training._take_step

    def step(training, *args):
        name = places.pop((training.plan.steps, training.step), None)
        if name is not None:
            training.store.wait()
            shutil.copytree(training.run, folder / name / training.run.name)
        take_step(training, *args)

    training.Training._take_step = step


def one_rank(world, root, folder):
    """Runs without the guard, with it, and killed before and after the switch; the epochs that were told of."""
    from oat_dist import trainer, training
    from oat_dist.engine import init_world

    world, folder = dataclasses.replace(init_world(threads=1), device=world.device), pathlib.Path(folder)
    spoil(training)
    trainer.train(make_config(root, folder / "none", guard="none"), world)
    kills = {(1, STEPS + 3): "killed before", (7, 2 * STEPS + 5): "killed after"}
    snapshots_at(training, dict(kills), folder / "kills")
    epochs = []
    trainer.train(make_config(root, folder / "switch"), world, lambda epoch, network: epochs.append(epoch))
    for name in kills.values():
        (folder / "kills" / name).rename(folder / name)
        trainer.train(make_config(root, folder / name), world)
    return epochs


@pytest.fixture(scope="module")
def runs(some_root, tmp_path_factory):
    """Name -> run folder, and the epochs."""
    folder = tmp_path_factory.mktemp("runs")
    (epochs,) = run_ranks(one_rank, 1, some_root, str(folder))
    names = ("none", "switch", "killed before", "killed after")
    return {name: next((folder / name).iterdir()) for name in names} | {"epochs": epochs}


def frontier(run):
    return json.loads((run / "frontier.json").read_text())


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_that_collapses_is_saved_by_the_guard(runs):
    (lost,), (saved,) = (frontier(runs[name])["points"] for name in ("none", "switch"))
    assert lost["ra"] < 0.1 and saved["ra"] > 0.3
    collapse = read_collapse(runs["switch"])
    assert (collapse.epoch, collapse.step, collapse.restored_step) == (2, 2 * STEPS, STEPS)
    assert collapse.ra_after < 0.5 * collapse.ra_before and collapse.action == "switch"
    assert frontier(runs["switch"])["collapse"] == dataclasses.asdict(collapse)
    assert "collapse" not in frontier(runs["none"])
    assert runs["epochs"] == [1, 2, 3]


@pytest.mark.dist
@pytest.mark.slow
def test_the_guard_changes_nothing_until_it_steps_in_and_then_measures_no_more(runs):
    unguarded, switch = metrics(runs["none"]), metrics(runs["switch"])
    (guarded,) = (line for line in switch if "guard_ra" in line)
    assert guarded == {"step": STEPS, "guard_ra": read_collapse(runs["switch"]).ra_before}
    assert not any("guard_ra" in line for line in unguarded) and not (runs["none"] / "guard.json").exists()
    rest = [line for line in switch if line != guarded]
    assert [line["step"] for line in rest] == [line["step"] for line in unguarded] == [5, 10, 15, 20, 25, 30]
    assert rest[:2] == unguarded[:2] and rest[2] != unguarded[2]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed before", "killed after"])
def test_a_run_killed_before_or_after_the_switch_ends_bit_identical(runs, name):
    (resumed,) = json.loads((runs[name] / "provenance.json").read_text())["resumed"]
    assert resumed["step"] == {"killed before": STEPS, "killed after": 2 * STEPS}[name]
    for file in ("metrics.jsonl", "model.safetensors", "frontier.json", "guard.json"):
        assert (runs[name] / file).read_bytes() == (runs["switch"] / file).read_bytes(), file


def two_ranks(world, root, folder):
    """A run that stops, on two ranks with two micro-batches per step: step and weights at its end, and its folder."""
    from oat_dist import trainer, training
    from oat_dist.config import EngineConfig
    from oat_dist.engine import init_world

    world, ended = dataclasses.replace(init_world(threads=1), device=world.device), []
    spoil(training)
    finish = training.Training.finish

    def remember(training):
        ended.append(training)
        return finish(training)

    training.Training.finish = remember
    # Nothing is validated before the collapse, and no checkpoint is due.
    checkpoint = CheckpointConfig(interval_epochs=3)
    engine = EngineConfig(accumulation=2, zero_stage=1)
    run = trainer.train(
        make_config(root, folder, guard="stop", validate=2, checkpoint=checkpoint, engine=engine), world
    )
    (training,) = ended
    return training.step, {name: value.clone() for name, value in training.network.state_dict().items()}, run


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_find_the_same_collapse_and_stop_with_the_last_good_network(some_root, tmp_path):
    (step, weights, run), other = run_ranks(two_ranks, 2, some_root, str(tmp_path))
    assert step == other[0] == STEPS and run == other[2]
    assert all(torch.equal(weights[name], other[1][name]) for name in weights)
    collapse = read_collapse(run)
    assert (collapse.epoch, collapse.restored_step, collapse.action) == (2, STEPS, "stop")
    checkpoint = CheckpointStore(run / "checkpoints", keep=2).newest()
    good, reported = checkpoint.tensors("averaged"), load_tensors(run / "model.safetensors")
    assert checkpoint.step == metrics(run)[-1]["step"] == STEPS
    assert good.keys() == reported.keys() and all(torch.equal(good[key], reported[key]) for key in good)
    assert frontier(run)["points"][0]["ra"] > 0.1 and frontier(run)["collapse"]["action"] == "stop"
