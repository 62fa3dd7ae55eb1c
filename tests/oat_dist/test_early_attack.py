"""Fewer attack steps in the first epochs: which attack an epoch has, what that saves, what is refused."""

import dataclasses
import types

import pytest
import torch

from oat_dist import training
from oat_dist.config import AttackConfig, Config, LossConfig, OptimConfig, default_step_size, fingerprint
from oat_dist.config_io import load_config
from oat_dist.cost import training_cost
from oat_dist.distributed import World
from oat_dist.errors import UserError
from oat_dist.graphed import GraphReplay
from oat_dist.losses import attack_plan, robust_term
from tests.oat_dist.test_graphed import Again, attack, make_network

EARLY = {"early_steps": 2, "early_share": 0.5}


def make(epochs=5, robust="pgd_at", **settings) -> Config:
    attack_cfg = AttackConfig(**{"eps_255": 76.5} | settings)
    return Config(attack=attack_cfg, loss=LossConfig(robust=robust), optim=OptimConfig(epochs=epochs))


def test_the_first_whole_epochs_of_the_share_have_fewer_steps_and_all_else_stays():
    config = make(**EARLY)
    plans = [attack_plan(config, epoch=epoch) for epoch in range(5)]
    assert [plan.steps for plan in plans] == [2, 2, 7, 7, 7]
    assert plans[0] == dataclasses.replace(plans[2], steps=2, step_size=default_step_size(config.attack.eps, 2))
    assert plans[2] == plans[4] == attack_plan(config) == attack_plan(make())
    # 0.29 * 100 is 28.999999999999996.
    assert make(epochs=100, early_steps=1, early_share=0.29).num_early_epochs == 29


def test_a_step_size_is_that_of_the_later_epochs():
    config = make(**EARLY, steps=3, step_size_255=20.0)
    early, late = (attack_plan(config, epoch=epoch) for epoch in (0, 4))
    assert (early.step_size, late.step_size) == (default_step_size(config.attack.eps, 2), 20 / 255)
    trades = make(robust="trades", **EARLY)
    assert attack_plan(trades, epoch=0).step_size == default_step_size(trades.attack.eps, 2)
    assert attack_plan(trades, epoch=4).steps == 10


def test_after_a_collapse_every_epoch_has_the_attack_of_the_guard():
    config = make(**EARLY)
    assert attack_plan(config, multi_step=True, epoch=0) == attack_plan(config, multi_step=True)


WRONG = {
    "--attack.early_steps=2": "attack.early_share=0.0: must be more than 0 with attack.early_steps=2",
    "--attack.early_share=0.5": "attack.early_share=0.5: needs attack.early_steps",
    "--attack.early_share=1 --attack.early_steps=2": "attack.early_share=1.0: must lie in [0, 1)",
    "--attack.early_share=-0.1 --attack.early_steps=2": "attack.early_share=-0.1: must lie in [0, 1)",
    "--attack.early_share=0.5 --attack.early_steps=0": "attack.early_steps=0: must be at least 1",
    "--attack.early_share=0.1 --attack.early_steps=2 --optim.epochs=9": "attack.early_share=0.1: must be at least one "
    "of optim.epochs=9",
    "--attack.early_share=0.5 --attack.early_steps=7": "attack.early_steps=7: must be less than the 7 attack.steps of "
    "later epochs",
    "--attack.early_share=0.5 --attack.early_steps=3 --attack.steps=3": "attack.early_steps=3: must be less than the 3 "
    "attack.steps of later epochs",
    "--attack.early_share=0.5 --attack.early_steps=1 --loss.robust=fgsm": "attack.early_steps=1: must be left out with "
    "loss.robust=fgsm, whose number of steps is its own",
    "--attack.early_share=0.5 --attack.early_steps=1 --loss.robust=rst_stab --data.extra=more": "attack.early_steps=1: "
    "must be left out with loss.robust=rst_stab, whose number of steps is its own",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_does_not_go_together_is_one_line_that_names_the_key(arguments):
    with pytest.raises(UserError) as error:
        robust_term(load_config(arguments.split()))
    assert str(error.value) == WRONG[arguments]


def test_early_steps_make_another_run_and_cost_less():
    def cost(config):
        return training_cost(config, in_channels=1, image_size=(8, 8), num_classes=10, num_train_images=256)

    plain, early = make(), make(**EARLY)
    assert fingerprint(early) != fingerprint(plain)
    saved = cost(plain).units_per_image - cost(early).units_per_image
    attacked = 5 / 6
    assert saved == pytest.approx(attacked * (7 - 2) * 2 * 2 / 5), "5 of 7 steps in 2 of 5 epochs"


def test_a_new_attack_has_recordings_of_its_own_and_the_same_goes_on_with_its(monkeypatch):
    recorder = Again()
    monkeypatch.setattr(training, "graph_replay", lambda *_, **__: GraphReplay(recorder, name="attack"))
    config = make(**EARLY, steps=3)
    network, lam = make_network(config), [0.1, 0.4, 1, 1]

    def run_from(first_epoch):
        one = types.SimpleNamespace(config=config, collapse=None, world=World(), plan=None, replay=None)
        for epoch in range(first_epoch, 5):
            training.Training._choose_attack(one, epoch)
            recorded = attack(network, config, lam, one.replay, epoch=epoch)
            assert torch.equal(recorded, attack(network, config, lam, None, epoch=epoch))
            assert one.plan == attack_plan(config, epoch=epoch)
        return one

    run_from(0)
    assert recorder.recorded == 2
    assert run_from(3).plan.steps == 3, "a run that goes on in its middle has the attack of that epoch"
    assert recorder.recorded == 3
