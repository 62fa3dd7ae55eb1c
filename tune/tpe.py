"""Optuna: samples by the tree-structured Parzen estimator, and which keys mattered. The only file that imports optuna.

TPE: Bergstra et al., "Algorithms for Hyper-Parameter Optimization" (NeurIPS 2011). Importance: fANOVA, Hutter et al.,
"An Efficient Approach for Assessing Hyperparameter Importance" (ICML 2014).
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from tune.space import Space

_LEAST_TRIALS = 4


def sampler(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler of a search; a third of the trials, at most ten, are random to begin with."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # constant_liar: trials that are still running count as bad ones, so that two at a time differ.
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, -(-trials // 3)), constant_liar=True)


class Suggest:
    """Suggests the next sample to an Optuna trial, key by key, so that only valid combinations are ever drawn.

    A key whose values are all possible beside those before it is one parameter; where only some are, these are a
    parameter of their own, because Optuna's choices may not change. A single possible value is no parameter.
    """

    def __init__(self, space: Space, job: Mapping[str, Any]) -> None:
        """Keep both.

        Args:
            space: The space.
            job: A search job without its sample.
        """
        self.space, self.job = space, dict(job)

    def __call__(self, trial: Any) -> dict[str, Any]:
        """The job of the next trial.

        Args:
            trial: An Optuna trial.
        """
        chosen: list[Any] = []
        for key, values in self.space.choices.items():
            possible = self.space.values_after(chosen)
            places = [values.index(value) for value in possible]
            name = key if len(possible) == len(values) else f"{key}:{','.join(map(str, places))}"
            place = trial.suggest_categorical(name, places) if len(places) > 1 else places[0]
            chosen.append(values[place])
        sample = dict(zip(self.space.choices, chosen, strict=True))
        for key, r in self.space.ranges.items():
            suggest = trial.suggest_int if r.integer else trial.suggest_float
            sample[key] = suggest(key, r.low, r.high, log=r.log)
        return {"job": {**self.job, "sample": sample}}


def importance(space: Space, samples: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> dict[str, float]:
    """Share of the score's variance that each key explains, largest first.

    Args:
        space: The space.
        samples: Sample of each trial.
        scores: Score of each, measured alike.

    Returns:
        Key -> share, summing to 1; empty for fewer than four trials, equal scores, or one value per key.
    """
    choices = {key: sorted({json.dumps(s[key]) for s in samples}) for key in space.choices}
    choices = {key: values for key, values in choices.items() if len(values) > 1}
    if len(samples) < _LEAST_TRIALS or len(set(scores)) == 1 or not (choices or space.ranges):
        return {}
    distributions: dict[str, Any] = {
        key: optuna.distributions.CategoricalDistribution(values) for key, values in choices.items()
    }
    for key, r in space.ranges.items():
        kind = optuna.distributions.IntDistribution if r.integer else optuna.distributions.FloatDistribution
        distributions[key] = kind(r.low, r.high, log=r.log)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for sample, score in zip(samples, scores, strict=True):
        params = {key: json.dumps(sample[key]) if key in choices else sample[key] for key in distributions}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
