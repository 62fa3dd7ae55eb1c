"""The search space: read from YAML, checked, and cleared of combinations that cannot be trained or change nothing.

A sample is {dotted key: value}; distributions stay the text they were written as until `settings` spells them out.
"""

import ast
import itertools
import json
import math
import pathlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oat_dist.config import Config, to_dict
from oat_dist.config_io import typed_value, with_settings
from oat_dist.errors import UserError
from oat_dist.losses import find_objective, require_setting, robust_term

DISTRIBUTION = "conditioning.distribution"
_FORMS = "discrete(0, 0.1, 1, weights=[2, 1, 1]), uniform(0, 1, zero=0.1) or beta(0.5, 1, zero=0.1)"
_PARAMETERS = {"discrete": (), "uniform": ("low", "high"), "beta": ("alpha", "beta")}
_OPTIONS = {"discrete": ("weights",), "uniform": ("zero", "knots"), "beta": ("zero", "knots")}
# What trials are measured with must be the same for all, and the same as the frontier's.
_FIXED = ("name", "output_dir", "data.", "evaluation.", "logging.", "checkpoint.", "attack.norm", "attack.eps_255",
          "engine.threads")  # fmt: skip
_MOST_COMBINATIONS = 20_000


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Spread evenly in the logarithm."""
    integer: bool = False
    """Whole numbers only."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """A checked space."""

    choices: Mapping[str, tuple[Any, ...]]
    """Dotted key -> values, of the keys that have a list."""
    ranges: Mapping[str, Range]
    """Dotted key -> range, of the others."""
    combinations: tuple[tuple[Any, ...], ...]
    """Values of all choices, in their order, that can be trained; of several that train the same, the first."""

    def grid(self) -> list[dict[str, Any]]:
        """All combinations as samples.

        Raises:
            UserError: A key has a range.
        """
        for key in self.ranges:
            raise UserError(f"space.{key}: a range has no grid; give a list of values, or search.algorithm=random")
        return [dict(zip(self.choices, values, strict=True)) for values in self.combinations]

    def draw(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Random samples: a combination, all being equally likely, and a number from each range."""
        generator = random.Random(seed)
        samples = []
        for _ in range(count):
            sample = dict(zip(self.choices, generator.choice(self.combinations), strict=True))
            for key, r in self.ranges.items():
                share = generator.random()
                value = r.low * (r.high / r.low) ** share if r.log else r.low + (r.high - r.low) * share
                sample[key] = round(value) if r.integer else value
            samples.append(sample)
        return samples

    def values_after(self, prefix: Sequence[Any]) -> tuple[Any, ...]:
        """Values of the next choice that some combination beginning with `prefix` has."""
        at = len(prefix)
        following = [values[at] for values in self.combinations if list(values[:at]) == list(prefix)]
        return tuple(value for value in tuple(self.choices.values())[at] if value in following)


def read_space(written: Mapping[str, Any], base: Config) -> Space:
    """Check a space against the run that trials start from.

    Args:
        written: Dotted key -> list of values, or {low, high, log}.
        base: That run.

    Raises:
        UserError: Unknown key, wrong type, unparsable distribution, unknown objective or setting of an objective, a key
            that must be the same in all trials, or no combination that can be trained.
    """
    if not written:
        raise UserError("space: is empty; name at least one key, e.g. conditioning.encoding: [dct, fourier]")
    count = math.prod(len(value) for value in written.values() if isinstance(value, list))
    if count > _MOST_COMBINATIONS:
        raise UserError(f"space: {count} combinations, at most {_MOST_COMBINATIONS} can be checked; shorten the lists")
    choices: dict[str, tuple] = {}
    ranges: dict[str, Range] = {}
    for key, value in written.items():
        if key.startswith(_FIXED):
            raise UserError(f"space.{key}: must be the same in all trials, or they could not be compared")
        if isinstance(value, dict):
            ranges[key] = _read_range(key, value)
        elif isinstance(value, list) and value:
            choices[key] = tuple(_read_value(key, v) for v in value)
        else:
            raise UserError(f"space.{key}={value!r}: expected a list of values, or {{low: 0.1, high: 1, log: true}}")
    return Space(choices=choices, ranges=ranges, combinations=_combinations(choices, ranges, base))


def settings(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as settings of a training run: dotted key -> value, distributions spelled out.

    The knots of a written distribution are for the encodings that have any, and go with the others.
    """
    spelled: dict[str, Any] = {}
    for key, value in sample.items():
        spelled |= parse_distribution(value) if key == DISTRIBUTION and "(" in value else {key: value}
    if "conditioning.knots" not in sample and sample.get("conditioning.encoding") in ("none", "fourier"):
        spelled.pop("conditioning.knots", None)
    return spelled


def parse_distribution(text: str) -> dict[str, Any]:
    """Settings that a written distribution stands for.

    Args:
        text: Such as discrete(0, 0.1, 1, weights=[2, 1, 1]), uniform(0, 1, zero=0.1), beta(0.5, 1, knots=[0, 1]).

    Raises:
        UserError: It is none of these.
    """
    try:
        call = ast.parse(text, mode="eval").body
        name = call.func.id
        numbers = [float(ast.literal_eval(argument)) for argument in call.args]
        options = {option.arg: ast.literal_eval(option.value) for option in call.keywords}
        ok = name in _PARAMETERS and options.keys() <= set(_OPTIONS[name])
        ok = ok and (numbers if name == "discrete" else len(numbers) == len(_PARAMETERS[name]))
        if not ok:
            raise ValueError
        spelled: dict[str, Any] = {"distribution": name}
        spelled |= {"lambdas": numbers} if name == "discrete" else dict(zip(_PARAMETERS[name], numbers, strict=True))
        for option, value in options.items():
            if option == "zero":
                spelled["zero_share"] = float(value)
            else:
                spelled[option] = [float(v) for v in value]
    except (SyntaxError, ValueError, TypeError, AttributeError):
        raise UserError(f"space.{DISTRIBUTION}={text!r}: expected {_FORMS}") from None
    return {f"conditioning.{key}": value for key, value in spelled.items()}


def _read_value(key: str, value: Any) -> Any:
    if key == DISTRIBUTION and isinstance(value, str) and "(" in value:
        parse_distribution(value)
        return value
    try:
        typed = typed_value(key, value)
        if key == "loss.robust":
            find_objective(typed)
        elif key.startswith("loss.settings."):
            require_setting(key)
        # Trials have a working directory of their own.
        return str(pathlib.Path(typed).absolute()) if key == "model.init_from" and typed else typed
    except UserError as error:
        raise UserError(f"space.{error}") from None


def _read_range(key: str, value: dict) -> Range:
    expected = f"space.{key}={value!r}: expected {{low: 0.1, high: 1, log: true}} with low < high"
    if not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        raise UserError(expected)
    low, high = _read_value(key, value["low"]), _read_value(key, value["high"])
    is_number = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not is_number or not low < high or (value.get("log") and low <= 0):
        raise UserError(expected + (" and low > 0 for log" if value.get("log") else ""))
    return Range(low=low, high=high, log=bool(value.get("log")), integer=isinstance(low, int))


def _combinations(choices: Mapping[str, tuple], ranges: Mapping[str, Range], base: Config) -> tuple[tuple, ...]:
    """Combinations that give a valid configuration at both ends of the ranges, each effective one once."""
    ends = [{key: getattr(r, end) for key, r in ranges.items()} for end in ("low", "high")]
    valid, seen, reason = [], set(), None
    for values in itertools.product(*choices.values()):
        sample = dict(zip(choices, values, strict=True))
        try:
            configs = [with_settings(base, settings(sample | end)) for end in ends]
            for config in configs:
                robust_term(config)
        except UserError as error:
            reason = error
            continue
        what = json.dumps(_effective(configs[0]), sort_keys=True)
        if what not in seen:
            seen.add(what)
            valid.append(values)
    if not valid:
        raise UserError(f"space: no combination can be trained; the last one: {reason}")
    return tuple(valid)


def _effective(config: Config) -> dict:
    """The configuration without the settings that have no effect beside the others."""
    tree = to_dict(config)
    cfg = tree["conditioning"]
    used = {"discrete": ("lambdas", "weights"), "uniform": ("zero_share", "low", "high"),
            "beta": ("zero_share", "alpha", "beta")}  # fmt: skip
    unused = {key for keys in used.values() for key in keys} - set(used[cfg["distribution"]])
    if cfg["film"] != "shared":
        unused.add("film_rank")
    if cfg["film"] == "none":
        unused |= {"encoding", "encoding_width", "knots", "film_start"}
    elif cfg["film"] == "table":
        unused |= {"encoding", "encoding_width"}
    elif cfg["encoding"] in ("none", "onehot"):
        unused.add("encoding_width")
    if tree["model"]["width_rule"] != "sandwich":
        del tree["model"]["width_samples"]
    for key in unused:
        del cfg[key]
    return tree
