"""From YAML, command line and dictionaries to a checked `Config`. The only file that imports jsonargparse.

Precedence, last wins: default < `--config FILE` < `--section.field=VALUE` < `overrides` (a search's sample). All four
pass the same type checks here and the same range checks in `config.py`. No class path is ever imported from YAML.
"""

import dataclasses
import difflib
import functools
import itertools
import json
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from oat_dist.config import Config, to_dict
from oat_dist.errors import UserError

C = TypeVar("C", bound=Config)


def load_config(argv: Sequence[str], overrides: Mapping[str, Any] | None = None, cls: type[C] = Config) -> C:
    """Build the configuration of a run.

    Args:
        argv: Command-line arguments without the program's name. `--help` and `--print_config` print and exit.
        overrides: Dotted key -> value, applied last, e.g. {"optim.lr": 0.05}.
        cls: `Config`, or a dataclass derived from it with more sections.

    Returns:
        The checked configuration.

    Raises:
        UserError: Unknown key, wrong type, value out of range, missing or unreadable file.
    """
    args = [*argv, *(_argument(key, value) for key, value in (overrides or {}).items())]
    for path in _config_files(args):
        _check_keys(path, cls)
    for option, value in itertools.zip_longest(args, args[1:], fillvalue=""):
        option, equals, attached = option.removeprefix("--").partition("=")
        _check_number(option, attached if equals else value, cls)
    return from_dict(_parse(args, cls), cls)


def typed_value(key: str, value: Any) -> Any:
    """A value as a setting takes it, by type alone: ranges and combinations are checked when a `Config` is built.

    Args:
        key: Dotted key.
        value: From YAML.

    Raises:
        UserError: Unknown key or wrong type.
    """
    _check_number(key, value, Config)
    settings: Any = _parse([_argument(key, value)], Config)
    for part in key.split("."):
        settings = settings[part]
    return list(settings) if isinstance(settings, tuple) else settings


def read_config(path: pathlib.Path) -> Config:
    """Read a configuration file written by `write_config`.

    Raises:
        UserError: As `load_config`.
    """
    return load_config(["--config", str(path)])


def write_config(config: Config, path: pathlib.Path) -> None:
    """Write the complete configuration as YAML that `--config` accepts."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def from_dict(settings: Mapping[str, Any], cls: type[C] = Config) -> C:
    """Build a `Config` from nested dictionaries whose values have the right types (lists stand for tuples)."""
    return _build(cls, settings)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """A configuration with some settings replaced; their types are not checked, all else is.

    Args:
        config: The configuration.
        settings: Dotted key -> value of the right type.

    Raises:
        UserError: Values out of range, or that do not go together.
    """
    tree = to_dict(config)
    for dotted, value in settings.items():
        *sections, key = dotted.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[key] = value
    return from_dict(tree, type(config))


def _build(cls: type, settings: Mapping[str, Any], prefix: str = "") -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in settings.items():
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{prefix}{key}.")
        elif value is None and types.NoneType not in typing.get_args(hints[key]):  # jsonargparse lets it pass
            raise UserError(f"{prefix}{key}=null: expected {_type_name(hints[key])}")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _argument(key: str, value: Any) -> str:
    """A setting as an argument; text stands unquoted, as a shell would pass it."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def _parse(args: Sequence[str], cls: type) -> dict[str, Any]:
    """Nested dictionaries of all settings, of the right types."""
    try:
        namespace = _parser(cls).parse_args(args)
    except ArgumentError as error:
        raise UserError(_one_line(str(error), cls)) from None
    return {k: v for k, v in namespace.as_dict().items() if k != "config"}


@functools.cache  # making one takes a tenth of a second, and a search space has many values to check
def _parser(cls: type) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description="Once-for-all adversarial training.")
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    parser.add_class_arguments(cls, as_group=False)
    return parser


def _config_files(args: Sequence[str]) -> list[pathlib.Path]:
    """The values of --config FILE and --config=FILE, in order."""
    files = [a.removeprefix("--config=") for a in args if a.startswith("--config=")]
    files += [b for a, b in pairwise(args) if a == "--config"]
    return [pathlib.Path(f) for f in files]


def _check_keys(path: pathlib.Path, cls: type) -> None:
    """Name an unknown key by its dotted path, with the nearest known one; jsonargparse names only the section."""
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}; name an existing YAML file") from None
    except RecursionError:
        raise UserError(f"--config {path}: nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML: {_one_line(str(error), cls)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--config {path}: expected sections and keys, got {type(settings).__name__}")
    _check_section(settings, to_dict(cls()), "", path, cls)


def _check_section(
    settings: Mapping[str, Any], known: Mapping[str, Any], prefix: str, path: pathlib.Path, cls: type
) -> None:
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise UserError(f"{dotted}: unknown key in {path}; {hint}")
        if isinstance(known[key], dict):
            if not isinstance(value, dict):
                keys = f"with keys {', '.join(known[key])}" if known[key] else "of names and values"
                raise UserError(f"{dotted}={value!r}: in {path} this is a section {keys}")
            if known[key]:
                _check_section(value, known[key], f"{dotted}.", path, cls)
            else:  # a section with keys of the user's own
                for name, number in value.items():
                    _check_number(f"{dotted}.{name}", number, cls)


def _check_number(key: str, value: Any, cls: type) -> None:
    """A value of a section of numbers is one; jsonargparse's own report does not name its key."""
    section, _, name = key.rpartition(".")
    if not name or _hint(section, cls) != dict[str, float]:
        return
    try:
        if isinstance(value, bool):
            raise ValueError
        float(value)
    except (TypeError, ValueError):
        raise UserError(f"{key}={value}: expected a number") from None


def _hint(key: str, cls: type) -> Any:
    """Annotated type of a dotted key, or None where there is no such key."""
    hint: Any = cls
    for part in key.split("."):
        hint = typing.get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint


def _one_line(message: str, cls: type) -> str:
    """One line per error, with the dotted key first and a hint for an unknown option."""
    line = " ".join(message.split())
    if line.startswith("unrecognized arguments: "):
        option = line.removeprefix("unrecognized arguments: ").split()[0]
        key = option.lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(key, _dotted_keys(to_dict(cls())), n=1, cutoff=0.5)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "; --help lists all keys")
    if line.startswith('Parser key "'):
        key, _, rest = line.removeprefix('Parser key "').partition('": ')
        return _type_error(key, rest, cls) if key in _dotted_keys(to_dict(cls())) else f"{key}: {rest}"
    return line


def _type_error(key: str, message: str, cls: type) -> str:
    """Jsonargparse's report of a wrong type, in the words of a user: what the key takes and what it got."""
    got = re.search(r"(?:Got|Given) value: (.*)$", message)
    hint = _hint(key, cls)
    if got is None or dataclasses.is_dataclass(hint):
        return f"{key}: {message}"
    return f"{key}={got[1]}: expected {_type_name(hint)}"


def _type_name(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, options))
    if typing.get_origin(hint) is tuple:
        return "a list of numbers, e.g. [0, 0.5, 1]"
    if typing.get_origin(hint) is dict:
        return "numbers by name, e.g. {beta: 6}" if options[1] is float else "values by name"
    if types.NoneType in options:
        return " or ".join(_type_name(option) for option in options if option is not types.NoneType) + " or null"
    return {float: "a number", int: "an integer", bool: "true or false", str: "text"}[hint]


def _dotted_keys(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in settings.items():
        keys += _dotted_keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return keys
