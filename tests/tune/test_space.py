"""The search space: what is read, refused and left out."""

import pathlib

import optuna
import pytest

from oat_dist.config import ConditioningConfig, Config, LossConfig, OptimConfig
from oat_dist.config_io import with_settings
from oat_dist.dedicated import recipe
from oat_dist.errors import UserError
from tune.search import choose_search
from tune.space import Range, parse_distribution, read_space, settings
from tune.tpe import Suggest, importance, sampler

KNOTS = "uniform(0, 1, zero=0.1, knots=[0, 1])"
PAIRS = {
    "conditioning.distribution": ["discrete(0, 1)", "uniform(0, 1, zero=0.1)", KNOTS],
    "conditioning.encoding": ["none", "dct", "fourier"],
    "conditioning.encoding_width": [8, 16],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("discrete(0, 0.5, 1)", {"distribution": "discrete", "lambdas": [0, 0.5, 1]}),
        ("discrete(0, 1, weights=[2, 1])", {"distribution": "discrete", "lambdas": [0, 1], "weights": [2, 1]}),
        ("uniform(0.1, 0.9, zero=0.2)", {"distribution": "uniform", "low": 0.1, "high": 0.9, "zero_share": 0.2}),
        ("beta(0.5, 2, knots=[0, 1])", {"distribution": "beta", "alpha": 0.5, "beta": 2, "knots": [0, 1]}),
    ],
)
def test_a_written_distribution_becomes_settings(text, expected):
    assert parse_distribution(text) == {f"conditioning.{key}": value for key, value in expected.items()}


@pytest.mark.parametrize(
    "text",
    ["discrete()", "uniform(1)", "beta(1, 2, weights=[1])", "normal(0, 1)", "discrete(0, one)", "uniform(0, 1", "(1)",
     "discrete(0, 1, weights=2)", "__import__('os').getcwd()"],
)  # fmt: skip
def test_a_distribution_that_cannot_be_parsed_is_named_with_what_would_be_right(text):
    with pytest.raises(UserError, match=r"space.conditioning.distribution=.*: expected discrete\(0, 0.1, 1"):
        read_space({"conditioning.distribution": [text]}, Config())


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space: is empty"),
        ({"conditioning.encodin": ["dct"]}, "space.conditioning.encodin: unknown key; did you mean conditioning.encod"),
        ({"conditioning.encoding": ["dtc"]}, "space.conditioning.encoding=dtc: expected one of none, onehot, dct"),
        ({"optim.lr": ["fast"]}, "space.optim.lr=fast: expected a number"),
        ({"optim.lr": 0.1}, r"space.optim.lr=0.1: expected a list of values, or \{low"),
        ({"optim.lr": {"low": 1, "high": 0.1}}, r"space.optim.lr=.*: expected \{low: 0.1"),
        ({"optim.lr": {"low": 0, "high": 1, "log": True}}, "and low > 0 for log"),
        ({"data.dataset": ["digits", "svhn"]}, "space.data.dataset: must be the same in all trials"),
        ({"evaluation.steps": [1, 2]}, "space.evaluation.steps: must be the same in all trials"),
        ({"conditioning.distribution": ["uniform(0, 1)"], "conditioning.encoding": ["dct"]},
         "space: no combination can be trained; the last one: conditioning.knots"),
        ({"loss.robust": ["tradse"]}, "space.loss.robust=tradse: no such objective; did you mean trades"),
        ({"loss.robust": ["trades"], "loss.settings.beta": ["x"]}, "space.loss.settings.beta=x: expected a number"),
        ({"loss.settings.bta": [1]}, "space.loss.settings.bta: no objective has this setting; did you mean loss."),
        ({"loss.settings.size": {"low": 1, "high": 2}},
         "space.loss.settings.size: no objective has this setting; there are"),
        ({"loss.settings.beta": [1, 2]}, "no combination can be trained; the last one: loss.settings.beta=2.0: bel"),
        ({"loss.robust": ["fgsm"], "attack.steps": [5]}, "no combination can be trained; the last one: attack.steps=5"),
        ({"seed": list(range(200)), "optim.epochs": list(range(1, 200))}, "space: 39800 combinations, at most 20000"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_space_is_one_line(space, message):
    with pytest.raises(UserError, match=message) as error:
        read_space(space, Config())
    assert "\n" not in str(error.value)


def test_invalid_pairs_and_settings_without_effect_are_left_out():
    grid = read_space(PAIRS, Config()).grid()
    short = [tuple(sample.values()) for sample in grid]
    # discrete: none (its width does nothing), dct 8, 16, fourier 8, 16. uniform: without knots no dct; with knots the
    # other two are what they are without.
    assert short[:5] == [("discrete(0, 1)", *rest) for rest in (("none", 8), ("dct", 8), ("dct", 16), ("fourier", 8),
                                                              ("fourier", 16))]  # fmt: skip
    assert ("uniform(0, 1, zero=0.1)", "dct", 8) not in short
    assert ("uniform(0, 1, zero=0.1, knots=[0, 1])", "dct", 8) in short
    assert not any(text.endswith("knots=[0, 1])") and encoding == "fourier" for text, encoding, _ in short)
    assert "conditioning.knots" not in settings(dict(zip(PAIRS, (KNOTS, "none", 8), strict=True)))
    base = Config(conditioning=ConditioningConfig(film="none"))
    assert len(read_space({"conditioning.encoding": ["dct", "onehot"]}, base).grid()) == 1


def test_objectives_and_their_settings_are_keys_like_others():
    space = read_space(
        {
            "loss.robust": ["pgd_at", "trades", "mart"],
            "loss.settings.beta": [1, 6],
            "loss.condition_on": [None, "beta"],
        },
        Config(),
    )
    # pgd_at has no beta, and lambda cannot drive that of mart.
    assert space.combinations == (
        ("trades", 1.0, None), ("trades", 1.0, "beta"), ("trades", 6.0, None), ("trades", 6.0, "beta"),
        ("mart", 1.0, None), ("mart", 6.0, None),
    )  # fmt: skip
    config = with_settings(Config(), settings(space.grid()[1]))
    assert (config.loss.robust, config.loss.settings, config.loss.condition_on) == ("trades", {"beta": 1.0}, "beta")
    space = read_space(
        {"loss.settings.weight": {"low": 0.1, "high": 1, "log": True}}, Config(loss=LossConfig(robust="alp"))
    )
    assert all(0.1 <= sample["loss.settings.weight"] <= 1 for sample in space.draw(5, 0))


def test_random_samples_repeat_and_stay_in_the_space():
    written = PAIRS | {"optim.lr": {"low": 0.01, "high": 1.0, "log": True}, "optim.epochs": {"low": 2, "high": 5}}
    space = read_space(written, Config())
    assert space.ranges["optim.epochs"] == Range(low=2, high=5, integer=True)
    samples = space.draw(200, 3)
    assert samples == space.draw(200, 3) != space.draw(200, 4)
    assert all(0.01 <= s["optim.lr"] <= 1 and s["optim.epochs"] in (2, 3, 4, 5) for s in samples)
    # Even in the logarithm: half of it lies below the geometric mean.
    assert 60 < sum(s["optim.lr"] < 0.1 for s in samples) < 140
    with pytest.raises(UserError, match=r"space.optim.lr: a range has no grid"):
        space.grid()
    assert settings(samples[0])["optim.lr"] == samples[0]["optim.lr"]


def test_optuna_is_offered_valid_combinations_alone_and_reaches_all():
    space = read_space(PAIRS | {"optim.lr": {"low": 0.1, "high": 0.2}}, Config(optim=OptimConfig(epochs=3)))
    suggest = Suggest(space, {"kind": "search", "folder": "trials"})
    study = optuna.create_study(sampler=sampler(0, 30))
    seen = set()
    for _ in range(120):
        trial = study.ask()
        job = suggest(trial)["job"]
        values = tuple(job["sample"][key] for key in space.choices)
        assert values in space.combinations and job["kind"] == "search"
        seen.add(values)
        study.tell(trial, job["sample"]["optim.lr"])
    assert len(seen) > 0.8 * len(space.combinations)


def test_importance_finds_the_key_that_matters():
    space = read_space({"conditioning.encoding": ["none", "dct", "fourier"], "conditioning.norm": ["dual", "single"],
                        "optim.lr": {"low": 0.1, "high": 0.2}}, Config())  # fmt: skip
    samples = space.draw(40, 0)
    scores = [float(s["conditioning.norm"] == "dual") + 0.1 * s["optim.lr"] for s in samples]
    shares = importance(space, samples, scores)
    assert next(iter(shares)) == "conditioning.norm" and shares["conditioning.norm"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)
    assert importance(space, samples[:3], scores[:3]) == {}


@pytest.mark.parametrize("path", sorted(pathlib.Path("tune/configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_searches_that_come_along_have_a_space_with_every_distribution_and_encoding(path):
    run, folder = choose_search(["--config", str(path)], None)
    space = read_space(run.space, run.base)
    assert folder is None and run.base.evaluation.lambdas == run.search.frontier_lambdas
    for at, values in enumerate(space.choices.values()):
        assert {combination[at] for combination in space.combinations} == set(values)


def test_the_ablation_is_the_whole_grid_and_shares_the_recipe_of_the_digits():
    ablation, digits = (choose_search(["--config", f"tune/configs/{n}.yaml"], None)[0] for n in ("ablation", "digits"))
    assert len(read_space(ablation.space, ablation.base).grid()) == 5 * 4 * 3
    assert recipe(ablation.base) == recipe(digits.base) and ablation.base.evaluation == digits.base.evaluation
