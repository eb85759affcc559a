"""A plan: which layer of a model gets which rank, and the exact number of parameters, before anything is changed."""

import math
import reprlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from lowrank_geo.allocation import factored_size
from lowrank_geo.candidates import KINDS
from lowrank_geo.init import INITS
from lowrank_geo.plan_table import table


@dataclass(frozen=True)
class Entry:
    """One weight matrix of the model: low-rank if `rank` is a number, else dense, with the reason."""

    name: str
    kind: str  # "linear", "conv1d" (Hugging Face's), "conv2d" or "other"
    m: int
    n: int
    rank: int | None
    reason: str
    dense_parameters: (
        int  # with the bias; a parameter that an earlier entry counts is not counted again
    )
    parameters: int
    error: float | None = None  # |W − W_r| / |W| in the Frobenius norm, once converted

    def __post_init__(self) -> None:
        m, n, rank = self.m, self.n, self.rank
        if self.kind not in KINDS:
            raise ValueError(f"Entry needs kind out of {', '.join(KINDS)}, got {self.kind!r}")
        if min(m, n, self.dense_parameters, self.parameters) < 0:
            raise ValueError(f"Entry needs sizes of at least 0, got {m}x{n} for {self.name!r}")
        if rank is None:
            return
        if not 1 <= rank <= min(m, n):
            raise ValueError(f"Entry needs 1 <= rank <= {min(m, n)} for {self.name!r}, got {rank}")
        saved = m * n - factored_size(m, n, rank)
        if self.dense_parameters - self.parameters != saved:
            raise ValueError(
                f"Entry needs {self.dense_parameters - saved} parameters for {self.name!r}, a {m}x{n} "
                f"matrix at rank {rank}, got {self.parameters}"
            )


@dataclass(frozen=True)
class Plan:
    """The entries of all weight matrices and the totals of the whole model; `print(plan)` shows a table.

    `dense_parameters` and `parameters` count every parameter of the model once: embeddings, biases, tied weights.
    """

    entries: tuple[Entry, ...]
    init: str
    dense_parameters: int
    parameters: int
    budget: float | None  # the fraction of dense_parameters asked for
    slack: int  # parameters that the budget would still allow

    def __post_init__(self) -> None:
        saved = sum(entry.dense_parameters - entry.parameters for entry in self.entries)
        if self.dense_parameters - self.parameters != saved:
            raise ValueError(
                f"Plan needs {self.dense_parameters - saved} parameters by its entries, got {self.parameters}"
            )
        if self.init not in INITS:
            raise ValueError(f"Plan needs init out of {', '.join(INITS)}, got {self.init!r}")
        if len({entry.name for entry in self.entries}) < len(self.entries):
            raise ValueError("Plan needs every name once, got one twice")

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of the low-rank layers by name."""
        return {entry.name: entry.rank for entry in self.entries if entry.rank is not None}

    def to_json(self) -> dict[str, Any]:
        """What `json.dumps` takes and `from_json` reads back."""
        return {**asdict(self), "entries": [asdict(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """The plan that `to_json` wrote.

        Raises: ValueError, in one sentence, for anything else.
        """
        values = _checked(data, cls)
        try:
            return cls(**{**values, "entries": tuple(_entries(values["entries"]))})
        except ValueError as error:
            raise ValueError(f"{error}; the plan was changed or is corrupt") from None

    def __str__(self) -> str:
        return table(self)


def _entries(listed: list[Any]) -> Iterable[Entry]:
    return (Entry(**_checked(entry, Entry)) for entry in listed)


_TYPES: dict[str, tuple[type, ...]] = {
    "rank": (int, type(None)),
    "error": (float, int, type(None)),
    "budget": (float, int, type(None)),
    "entries": (list,),
    **dict.fromkeys(("name", "kind", "reason", "init"), (str,)),
    **dict.fromkeys(("m", "n", "dense_parameters", "parameters", "slack"), (int,)),
}


def _checked(data: Any, kind: type[Plan] | type[Entry]) -> dict[str, Any]:
    """`data` if it is a dictionary of exactly the fields of `kind`, of their types."""
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        raise ValueError(
            f"Plan.from_json needs an object of {', '.join(sorted(names))}, got {reprlib.repr(data)}; "
            "read a file written by lowrank_geo"
        )
    for name, value in data.items():
        right = isinstance(value, _TYPES[name]) and not isinstance(value, bool)
        if not right or isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"Plan.from_json needs {name} of type {_TYPES[name][0].__name__}, got {reprlib.repr(value)}; "
                "read a file written by lowrank_geo"
            )
    return data
