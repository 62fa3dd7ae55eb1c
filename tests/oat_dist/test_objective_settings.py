"""Objectives as a user names them: what is refused, and with which line; methods from outside; the table of them."""

import dataclasses
import pathlib

import pytest
import torch

from oat_dist.config import AttackConfig, ConditioningConfig, Config, EngineConfig, LossConfig
from oat_dist.config_io import load_config
from oat_dist.distributed import World
from oat_dist.errors import UserError
from oat_dist.losses import ROBUST, Objective, attack_plan, register, robust_term, unregister
from oat_dist.losses import __main__ as listing
from oat_dist.step import training_losses
from oat_dist.trainer import train
from tests.oat_dist.test_step import disturbed, make_batch

WRONG = {
    "--loss.robust=tradse": "loss.robust=tradse: no such objective; did you mean trades",
    "--loss.robust=zzz": "loss.robust=zzz: no such objective; there are alp, fgsm, fgsm_rs, grad_align, llr, mart",
    "--loss.settings.beta=1": "loss.settings.beta=1.0: belongs to mart, rst_adv, rst_stab, trades; the settings "
    "of loss.robust=pgd_at: none",
    "--loss.robust=alp --loss.settings.beta=1": "loss.settings.beta=1.0: belongs to mart, rst_adv, rst_stab, "
    "trades; the settings of loss.robust=alp: loss.settings.weight",
    "--loss.robust=tla --loss.settings.gamma=1": "loss.settings.gamma=1.0: the settings of loss.robust=tla: "
    "loss.settings.triplet, loss.settings.norm, loss.settings.margin",
    "--loss.robust=mart --loss.settings.beta=-1": "loss.settings.beta=-1.0: must be at least 0 and finite",
    "--loss.robust=fgsm --loss.settings.alpha=2": "loss.settings.alpha=2.0: must lie in [0, 1]",
    "--loss.robust=fgsm --attack.steps=5": "attack.steps=5: must be 1 (or left out) with loss.robust=fgsm",
    "--loss.robust=min_max --attack.steps=5": "attack.steps=5: must be 1 (or left out) with loss.robust=min_max",
    "--loss.robust=fgsm_rs --attack.steps=5": "attack.steps=5: must be 1 (or left out) with loss.robust=fgsm_rs",
    "--loss.robust=n_fgsm --attack.steps=5": "attack.steps=5: must be 1 (or left out) with loss.robust=n_fgsm",
    "--loss.robust=grad_align --attack.steps=5": "attack.steps=5: must be 1 (or left out) with loss.robust=grad_align",
    **{
        f"--loss.clean_at_one=false --{key}": f"loss.clean_at_one=False: must be true with {key}"
        for key in map("loss.robust={}".format, ("fgsm", "alp", "trades", "mart", "llr", "tla", "grad_align"))
    },
    "--loss.robust=trades --loss.condition_on=gamma": "loss.condition_on=gamma: with loss.robust=trades, lambda can "
    "drive beta",
    "--loss.robust=llr --loss.condition_on=linearity": "loss.condition_on=linearity: with loss.robust=llr, lambda can "
    "drive weight",
    "--loss.robust=mart --loss.condition_on=beta": "loss.condition_on=beta: with loss.robust=mart, lambda can drive n",
    "--loss.robust=trades --attack.random_start=false": "attack.random_start=False: must be true (or left out) with "
    "loss.robust=trades",
    "--loss.robust=llr --attack.random_start=false": "attack.random_start=False: must be true (or left out) with "
    "loss.robust=llr",
    "--loss.robust=llr --engine.compile=true": "engine.compile=True: must be false with loss.robust=llr",
    "--loss.robust=grad_align --engine.compile=true": "engine.compile=True: must be false with loss.robust=grad_align",
}  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG)
def test_settings_that_do_not_go_together_are_one_line_that_names_the_key(arguments):
    with pytest.raises(UserError) as error:
        robust_term(load_config(arguments.split()))
    assert str(error.value).startswith(WRONG[arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_setting_that_is_not_a_finite_number_is_refused(value):
    with pytest.raises(UserError, match=r"^loss.settings.beta=(nan|inf): must be at least 0 and finite"):
        robust_term(Config(loss=LossConfig(robust="mart", settings={"beta": value})))


def test_a_wrong_objective_stops_a_run_before_anything_is_written(tmp_path):
    config = load_config(["--loss.robust=tradse", f"--output_dir={tmp_path}/runs", f"--data.root={tmp_path}/data"])
    with pytest.raises(UserError, match=r"loss.robust=tradse: no such objective"):
        train(config, World())
    assert list(tmp_path.iterdir()) == []


def test_methods_that_need_no_clean_logits_can_leave_them_out():
    for name in ("pgd_at", "min_max", "fgsm_rs", "n_fgsm"):
        robust_term(Config(loss=LossConfig(robust=name, clean_at_one=False)))


def test_the_attack_is_the_papers_where_the_attack_section_is_silent():
    def plan(name, **attack):
        plan = attack_plan(Config(loss=LossConfig(robust=name), attack=AttackConfig(eps_255=8, **attack)))
        return plan.steps, round(plan.step_size * 255, 9), plan.start, round(plan.start_size * 255, 9), plan.project

    assert plan("pgd_at") == (7, round(10 / 7, 9), "uniform", 8, True)
    assert plan("fgsm") == plan("min_max") == plan("grad_align") == (1, 8, "none", 8, True)
    assert plan("alp") == plan("mart") == (10, 2, "uniform", 8, True)
    assert plan("trades") == (10, 2, "gaussian", 0.255, True)
    assert plan("llr") == (10, 1, "uniform", 8, True)
    assert plan("tla") == (7, 2, "uniform", 8, True)
    assert plan("fgsm_rs") == (1, 10, "uniform", 8, True)
    assert plan("n_fgsm") == (1, 8, "uniform", 16, False)
    assert plan("mart", steps=3, step_size_255=4, random_start=False) == (3, 4, "none", 8, True)
    assert plan("fgsm", random_start=True) == (1, 8, "uniform", 8, True)


@pytest.fixture
def toy():
    """A method of another package: the adversarial logit of the label, the lower the worse."""

    def loss(examples):
        score = examples.adversarial_logits_AK.gather(1, examples.label_A[:, None])[:, 0]
        return examples.settings["scale"] * torch.nn.functional.softplus(-score)

    objective = register(Objective(name="toy", source="a test", loss=loss, settings={"scale": 2.0}))
    yield objective
    unregister(objective)
    assert "toy" not in ROBUST


def test_a_method_registered_from_outside_trains(toy):
    conditioning = ConditioningConfig(lambdas=(0.0, 1.0))
    config = Config(conditioning=conditioning, loss=LossConfig(robust="toy", settings={"scale": 3.0}))
    assert robust_term(config) == dataclasses.replace(toy, settings={"scale": 3.0})
    network, batch = disturbed(config), make_batch(4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    lam, losses = torch.tensor([0.0, 1, 1, 1], dtype=torch.float64), []
    for _ in range(3):
        step = training_losses(network, batch, lam, config=config, epoch=0, forward=network)
        optimizer.zero_grad()
        step.loss_N.mean().backward()
        optimizer.step()
        losses.append(step.counts["loss_robust"].item())
    assert losses[2] < losses[0]


def test_a_name_belongs_to_one_method_and_a_declaration_is_checked(toy):
    assert register(toy) is toy
    with pytest.raises(ValueError, match=r"name='toy': there is an objective of this name"):
        register(dataclasses.replace(toy, source="another"))
    for wrong in ("conditionable", "at_most_one"):
        with pytest.raises(ValueError, match=rf"{wrong}=\('power',\): power is no setting of toy"):
            dataclasses.replace(toy, **{wrong: ("power",)})


def test_the_table_of_objectives_in_the_documents_is_that_of_the_code(tmp_path, capsys):
    path = pathlib.Path("docs/objectives.md")
    text = path.read_text()
    assert listing.renewed(text) == text, "python -m oat_dist.losses docs/objectives.md"
    listing.main([])
    assert capsys.readouterr().out == listing.table()
    assert listing.table().count("\n") == 2 + len(ROBUST)
    copy = tmp_path / "objectives.md"
    copy.write_text(text.replace("beta 6", "beta 7"))
    listing.main([str(copy)])
    assert copy.read_text() == text
    with pytest.raises(ValueError, match="expected a line"):
        listing.renewed("no table")


def test_compiling_is_no_hindrance_without_input_gradients():
    assert robust_term(Config(loss=LossConfig(robust="mart"), engine=EngineConfig(compile=True))).name == "mart"
