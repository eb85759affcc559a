"""The fields of a configuration as options, so that names, defaults and help are written once."""

import dataclasses
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints

import typer

from lowrank_geo.train.config import TrainConfig

Command = Callable[..., None]


def config_options(*names: str, of: Any = TrainConfig) -> Callable[[Command], Command]:
    """Give a command, which takes them as **options, one option for each field named of a dataclass, or for all."""
    hints = get_type_hints(of)
    added = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=typer.Option(field.default, help=field.metadata["help"]),
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(of)
        if not names or field.name in names
    ]

    def decorate(command: Command) -> Command:
        own = [
            parameter
            for parameter in signature(command).parameters.values()
            if parameter.kind is not Parameter.VAR_KEYWORD
        ]
        command.__signature__ = Signature([*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return command

    return decorate


def given(command: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that stand on the command line."""

    def stands(name: str) -> bool:
        source = command.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    return {name: value for name, value in options.items() if stands(name)}
