"""From what the user asks for (a budget, a rank, a ratio, or ranks by pattern) to the rank of each layer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

from lowrank_geo.allocation import Matrix, allocate, largest_saving_rank
from lowrank_geo.candidates import ALREADY, Candidate, matches
from lowrank_geo.init import INITS


class Choice(NamedTuple):
    """The rank of one layer, or None with the reason."""

    rank: int | None
    reason: str = ""


@dataclass(frozen=True)
class Wish:
    """What `plan_ranks` was asked for: exactly one of the first four.

    Raises: ValueError or TypeError for what no model could be given.
    """

    budget: float | None
    rank: int | None
    ratio: float | None
    ranks: Mapping[str, int] | None
    min_rank: int
    multiple_of: int
    init: str

    def __post_init__(self) -> None:
        wishes = {name: getattr(self, name) for name in ("budget", "rank", "ratio", "ranks")}
        given = [name for name, value in wishes.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"plan_ranks needs exactly one of {', '.join(wishes)}, got {' and '.join(given) or 'none'}; "
                "give one, as in budget=0.5"
            )
        if self.init not in INITS:
            raise ValueError(
                f"plan_ranks needs init out of {', '.join(INITS)}, got {self.init!r}; use one of them"
            )
        _check_fraction("budget", self.budget)
        _check_fraction("ratio", self.ratio)
        _check_count("rank", self.rank)
        _check_count("min_rank", self.min_rank)
        _check_count("multiple_of", self.multiple_of)
        if self.ranks is not None and not isinstance(self.ranks, Mapping):
            raise TypeError(
                f"plan_ranks needs ranks as a dictionary, got {type(self.ranks).__name__}; "
                "write {'pattern': rank}"
            )
        for pattern, rank in (self.ranks or {}).items():
            _check_count(f"the rank of {pattern!r}", rank)
        if given[0] in ("rank", "ranks") and (self.min_rank, self.multiple_of) != (1, 1):
            raise ValueError(
                f"plan_ranks needs min_rank and multiple_of with budget or ratio only, got them with {given[0]}; "
                "leave them out"
            )

    def matrix(self, layer: Candidate) -> Matrix:
        return Matrix.of(layer.m, layer.n, min_rank=self.min_rank, multiple_of=self.multiple_of)


def choose(wish: Wish, candidates: Sequence[Candidate], total: int, size: int) -> dict[str, Choice]:
    """The choice for every convertible layer by name.

    `total` counts the parameters of the dense model, `size` those of the model as it is.
    Raises: ValueError for a budget out of reach, a rank too large for every layer, a pattern without effect.
    """
    free = [c for c in candidates if not c.reason]
    if wish.budget is not None:
        return _spend(wish, free, total, size - sum(c.m * c.n for c in free))
    if wish.ratio is not None:
        ranks = [wish.matrix(c).at(wish.ratio) for c in free]
        return _named(wish, free, ranks)
    if wish.ranks is not None:
        return _by_pattern(wish.ranks, candidates, free)
    assert wish.rank is not None
    _check_possible("rank", wish.rank, free)
    return {c.name: _if_smaller(c, wish.rank) for c in free}


def _spend(wish: Wish, free: list[Candidate], total: int, kept: int) -> dict[str, Choice]:
    """Ranks of one ratio under the budget; `kept` is what all other parameters take."""
    assert wish.budget is not None
    limit = int(wish.budget * total)
    matrices = [wish.matrix(c) for c in free]
    needed = kept + sum(matrix.cost(matrix.at(0.0)) for matrix in matrices)
    if needed > limit:
        raise ValueError(
            f"plan_ranks needs budget >= {_reachable(needed, total):.4f} at min_rank {wish.min_rank}, got "
            f"{wish.budget:g}; raise the budget, or let more layers or lower ranks take part"
        )
    return _named(wish, free, allocate(matrices, limit - kept))


def _reachable(needed: int, total: int) -> float:
    """The smallest budget of four digits that allows `needed` parameters."""
    digits = math.ceil(needed / total * 10_000)
    while int(digits / 10_000 * total) < needed:
        digits += 1
    return digits / 10_000


def _named(wish: Wish, free: list[Candidate], ranks: Iterable[int | None]) -> dict[str, Choice]:
    return {
        c.name: Choice(rank, "" if rank is not None else _why_dense(wish.matrix(c)))
        for c, rank in zip(free, ranks, strict=True)
    }


def _why_dense(matrix: Matrix) -> str:
    if matrix.lowest <= matrix.highest:
        return f"its share exceeds {matrix.highest}, the largest rank that saves parameters"
    steps = f" in steps of {matrix.step}" if matrix.step > 1 else ""
    return f"no rank from {matrix.lowest} up{steps} saves parameters"


def _if_smaller(layer: Candidate, rank: int) -> Choice:
    largest = largest_saving_rank(layer.m, layer.n)
    if rank <= largest:
        return Choice(rank)
    return Choice(None, f"rank {rank} does not save parameters, the largest that does is {largest}")


def _by_pattern(
    ranks: Mapping[str, int], candidates: Sequence[Candidate], free: list[Candidate]
) -> dict[str, Choice]:
    """The first pattern that matches a layer decides."""
    choices = {c.name: Choice(None, "no pattern in ranks matches it") for c in free}
    left = list(free)
    for pattern, rank in ranks.items():
        taken = [c for c in left if any(matches(pattern, name) for name in c.names)]
        if not taken:
            _refuse_idle(pattern, candidates)
        _check_possible(f"the rank of {pattern!r}", rank, taken)
        choices.update({c.name: _if_smaller(c, rank) for c in taken})
        left = [c for c in left if c not in taken]
    return choices


def _refuse_idle(pattern: str, candidates: Sequence[Candidate]) -> None:
    """Raise for a pattern in `ranks` that decides nothing, unless its layers are low-rank already."""
    matched = [c for c in candidates if any(matches(pattern, name) for name in c.names)]
    if any(c.reason == ALREADY for c in matched):
        return
    if not matched:
        raise ValueError(
            f"plan_ranks needs patterns in ranks that match a layer, got {pattern!r}, which matches none; "
            "see print(plan_ranks(model, ratio=0.5)) for the names"
        )
    why = matched[0].reason or "an earlier pattern has it, put this one first"
    raise ValueError(
        f"plan_ranks needs patterns in ranks that match a convertible layer, got {pattern!r}, which matches "
        f"{matched[0].name!r}: {why}; change the pattern"
    )


def _check_possible(call: str, rank: int, layers: list[Candidate]) -> None:
    largest = max((min(c.m, c.n) for c in layers), default=rank)
    if rank > largest:
        raise ValueError(
            f"plan_ranks needs {call} <= {largest}, the largest min(m, n) of the layers, got {rank}; "
            "choose a smaller rank"
        )


def _check_fraction(name: str, value: float | None) -> None:
    if value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(
            f"plan_ranks needs {name} as a number in (0, 1], got {value!r}; write a fraction, as in 0.5"
        )
    if not 0 < value <= 1:
        raise ValueError(
            f"plan_ranks needs {name} in (0, 1], got {value}; write a fraction, as in 0.5"
        )


def _check_count(name: str, value: int | None) -> None:
    if value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(
            f"plan_ranks needs {name} as an integer, got {value!r}; write a whole number"
        )
    if value < 1:
        raise ValueError(f"plan_ranks needs {name} >= 1, got {value}; choose a positive number")
