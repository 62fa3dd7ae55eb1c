"""From the `loss` and `attack` sections to an objective with its settings and its attack, or a line that says why not.

Letters: A attacked images.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from oat_dist.attacks import AttackPlan, cross_entropy
from oat_dist.config import AttackConfig, Config, LossConfig, default_step_size
from oat_dist.errors import UserError, require
from oat_dist.losses.objective import ROBUST, AttackDefaults, Objective


def robust_term(config: Config) -> Objective:
    """The robust term of a configuration, with its settings filled in.

    Raises:
        UserError: There is no such objective, or a setting does not go with it.
    """
    loss = config.loss
    objective = find_objective(loss.robust)
    _check_settings(objective, loss)
    if "extra_data" in objective.needs:
        expected = f"must name a data set with pseudo-labels, which loss.robust={loss.robust} trains on"
        require(config.data.extra is not None, "data.extra", config.data.extra, expected)
    if objective.has_input_gradient and config.engine.compile:
        expected = f"must be false with loss.robust={loss.robust}, whose gradients are differentiated once more"
        raise UserError(f"engine.compile=True: {expected}")
    _check_attack(objective, config.attack)
    return replace(objective, settings={**objective.settings, **loss.settings})


def find_objective(name: str) -> Objective:
    """The objective of a name, with its default settings.

    Raises:
        UserError: There is none.
    """
    if name not in ROBUST:
        near = difflib.get_close_matches(name, ROBUST, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(ROBUST))}"
        raise UserError(f"loss.robust={name}: no such objective; {hint}")
    return ROBUST[name]


def require_setting(key: str) -> None:
    """Check that some objective has a setting.

    Args:
        key: Its dotted key, `loss.settings.NAME`.

    Raises:
        UserError: None has.
    """
    known = sorted({name for objective in ROBUST.values() for name in objective.settings})
    name = key.rpartition(".")[2]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"did you mean loss.settings.{near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"{key}: no objective has this setting; {hint}")


def _check_settings(objective: Objective, loss: LossConfig) -> None:
    """Every setting belongs to the objective, and lambda may drive what it is asked to."""
    for key, value in loss.settings.items():
        if key not in objective.settings:
            owners = sorted(name for name, other in ROBUST.items() if key in other.settings)
            its = ", ".join(f"loss.settings.{name}" for name in objective.settings) or "none"
            belongs = f"belongs to {', '.join(owners)}; " if owners else ""
            raise UserError(f"loss.settings.{key}={value}: {belongs}the settings of loss.robust={loss.robust}: {its}")
        most = 1 if key in objective.at_most_one else math.inf
        expected = "must be at least 0 and finite" if most == math.inf else f"must lie in [0, {most}]"
        require(0 <= value <= most and value < math.inf, f"loss.settings.{key}", value, expected)
    if loss.condition_on is not None and loss.condition_on not in objective.conditionable:
        its = ", ".join(objective.conditionable) or "none of its settings"
        raise UserError(
            f"loss.condition_on={loss.condition_on}: with loss.robust={loss.robust}, lambda can drive {its}"
        )
    if not loss.clean_at_one and (loss.condition_on or objective.needs & {"clean_logits", "input_gradient"}):
        why = f"loss.condition_on={loss.condition_on}" if loss.condition_on else f"loss.robust={loss.robust}"
        expected = f"must be true with {why}, which needs the clean logits of every attacked image"
        raise UserError(f"loss.clean_at_one=False: {expected}")


def _check_attack(objective: Objective, attack: AttackConfig) -> None:
    defaults = objective.attack
    if attack.steps is not None and attack.steps != defaults.steps and (defaults.single_step or defaults.steps == 0):
        right = f"{defaults.steps} (or left out)" if defaults.steps else "left out"
        expected = f"must be {right} with loss.robust={objective.name}"
        raise UserError(f"attack.steps={attack.steps}: {expected}")
    if attack.early_steps is not None:
        expected = f"must be left out with loss.robust={objective.name}, whose number of steps is its own"
        require(not defaults.single_step and defaults.steps > 0, "attack.early_steps", attack.early_steps, expected)
        steps = defaults.steps if attack.steps is None else attack.steps
        expected = f"must be less than the {steps} attack.steps of later epochs"
        require(attack.early_steps < steps, "attack.early_steps", attack.early_steps, expected)
    if attack.random_start is False and defaults.maximise is not cross_entropy:
        expected = f"must be true (or left out) with loss.robust={objective.name}, whose attack has no gradient at x"
        raise UserError(f"attack.random_start=False: {expected}")
    if attack.random_start is False and defaults.steps == 0:
        expected = f"must be true (or left out) with loss.robust={objective.name}, which perturbs by its start alone"
        raise UserError(f"attack.random_start=False: {expected}")


def attack_plan(config: Config, *, multi_step: bool = False, epoch: int | None = None) -> AttackPlan:
    """The attack of training: what the `attack` section says, and where it is silent the paper of the objective.

    Args:
        config: Configuration of the run.
        multi_step: PGD of PGD-AT in its place, of the same ball (see `oat_dist.guard`), in every epoch.
        epoch: Epoch, from 0; default: the last.
    """
    cfg, defaults = config.attack, robust_term(config).attack
    if multi_step:
        cfg, defaults = AttackConfig(norm=cfg.norm, eps_255=cfg.eps_255), AttackDefaults()
    steps = defaults.steps if cfg.steps is None else cfg.steps
    if cfg.early_steps is not None and epoch is not None and epoch < config.num_early_epochs:
        steps = cfg.early_steps
        step_size = default_step_size(cfg.eps, steps)
    elif cfg.step_size_255 is not None:
        step_size = cfg.step_size_255 / 255
    elif defaults.step_share is not None:
        step_size = defaults.step_share * cfg.eps
    else:
        step_size = default_step_size(cfg.eps, steps)
    start = defaults.start
    if cfg.random_start is not None:
        own = defaults.start if defaults.start != "none" else "uniform"
        start = own if cfg.random_start else "none"
    size = defaults.start_size if start == "gaussian" else defaults.start_size * cfg.eps
    return AttackPlan(
        norm=cfg.norm, eps=cfg.eps, steps=steps, step_size=step_size, start=start, start_size=size,
        project=defaults.project, maximise=defaults.maximise,
    )  # fmt: skip


def settings_at(objective: Objective, condition_on: str | None, lam_A: Tensor) -> Mapping[str, float | Tensor]:
    """The settings, that which lambda drives times the lambda of each image.

    Args:
        objective: From `robust_term`.
        condition_on: `loss.condition_on`.
        lam_A: Lambdas of the attacked images, in the dtype of the losses.
    """
    if condition_on is None:
        return objective.settings
    return {**objective.settings, condition_on: torch.mul(lam_A, objective.settings[condition_on])}
