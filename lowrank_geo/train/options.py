"""Dataclasses whose fields are options of the command line: declared once, checked, and kept as JSON."""

import dataclasses
import math
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any, TypeVar, get_args, get_type_hints

Config = TypeVar("Config")

RULES: dict[str, Callable[[Any], bool]] = {
    "at least 1": lambda x: x >= 1,
    "at least 0 and below 2^63": lambda x: 0 <= x < 2**63,
    "a positive number": lambda x: math.isfinite(x) and x > 0,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "a number from 0 on": lambda x: math.isfinite(x) and x >= 0,
}
SIZES = ("budget", "rank", "ratio")


def option(default: Any, help: str) -> Any:
    """A field that is also an option of the command line."""
    return field(default=default, metadata={"help": help})


def check_options(
    command: str,
    config: Any,
    choices: Mapping[str, Sequence[str]],
    rules: Mapping[str, Sequence[str]],
) -> None:
    """Check the types of all options, then `choices` (option: what it may be) and `rules` (of RULES: options).

    Raises: TypeError or ValueError, naming the option of `command`. An option that is None is not checked.
    """
    hints = get_type_hints(type(config))
    for each in dataclasses.fields(config):
        _check_type(command, each.name, hints[each.name], getattr(config, each.name))
    for name, allowed in choices.items():
        _check(
            command,
            config,
            name,
            partial(operator.contains, allowed),
            "one of " + ", ".join(allowed),
        )
    for rule, names in rules.items():
        for name in names:
            _check(command, config, name, RULES[rule], rule)


def check_size(command: str, config: Any) -> None:
    """Raise ValueError if more than one of budget, rank and ratio is given."""
    sizes = [name for name in SIZES if getattr(config, name) is not None]
    if len(sizes) > 1:
        raise ValueError(
            f"{command} needs one of --budget, --rank and --ratio, got {' and '.join('--' + s for s in sizes)}; "
            "leave out all but one"
        )


def from_json(cls: type[Config], value: Any) -> Config:
    """The config whose fields a JSON object holds.

    Raises: ValueError if options are missing or unknown, or hold what no run can have.
    """
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(value, dict) or set(value) != names:
        got = sorted(set(value) ^ names) if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"a run's config needs exactly the options of this version, got a difference in {got}; "
            "use the version of lowrank_geo that wrote the run"
        )
    try:
        return cls(**value)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check_type(command: str, name: str, kind: Any, value: Any) -> None:
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{command} needs {_flag(name)} to be {wanted}, got {value!r}; correct it")


def _check(command: str, config: Any, name: str, holds: Callable[[Any], bool], rule: str) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ValueError(f"{command} needs {_flag(name)} to be {rule}, got {value}; correct it")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
