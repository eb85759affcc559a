"""Ranks for a list of m×n matrices under a limit on their parameters, as near to one ratio r / min(m, n) as it gets.

A rank costs r(m + n + r) parameters; a matrix for which no allowed rank costs less than m·n stays dense, as None.
"""

import heapq
import math
from typing import NamedTuple


class Matrix(NamedTuple):
    """The ranks allowed for one matrix: lowest, lowest + step, ..., highest, then dense; none if lowest > highest."""

    m: int
    n: int
    lowest: int
    highest: int  # the largest allowed rank that costs less than m·n
    step: int

    @classmethod
    def of(cls, m: int, n: int, *, min_rank: int = 1, multiple_of: int = 1) -> "Matrix":
        """The matrix with ranks from `min_rank` up that are multiples of `multiple_of`."""
        lowest = math.ceil(min_rank / multiple_of) * multiple_of
        return cls(
            m, n, lowest, largest_saving_rank(m, n) // multiple_of * multiple_of, multiple_of
        )

    def at(self, ratio: float) -> int | None:
        """The largest allowed rank up to ratio·min(m, n), the lowest if there is none, or None for dense."""
        below = math.floor(ratio * min(self.m, self.n) + 1e-9) // self.step * self.step
        rank = max(below, self.lowest)
        return rank if rank <= self.highest else None

    def after(self, rank: int) -> int | None:
        """The next rank up, or None for dense."""
        return rank + self.step if rank + self.step <= self.highest else None

    def cost(self, rank: int | None) -> int:
        """The parameters of the matrix at this rank, or dense."""
        return self.m * self.n if rank is None else factored_size(self.m, self.n, rank)


def factored_size(m: int, n: int, rank: int) -> int:
    """The parameters of U (m, r), S (r, r) and V (n, r)."""
    return rank * (m + n + rank)


def largest_saving_rank(m: int, n: int) -> int:
    """The largest r with r(m + n + r) < m·n, or 0.

    >>> largest_saving_rank(192, 192), largest_saving_rank(1, 1)
    (79, 0)
    """
    # r² + (m+n) r = mn has the root (√((m+n)² + 4mn) − (m+n)) / 2; the rounded-up one is excluded by the − 1.
    total = m + n
    return max((math.isqrt(total * total + 4 * m * n - 1) - total) // 2, 0) if m and n else 0


def allocate(matrices: list[Matrix], limit: int) -> list[int | None]:
    """One rank ratio for all, by bisection, then single steps of rank in the order of the ratio they lead to.

    Raises: ValueError if the cheapest ranks already cost more than `limit`.

    >>> allocate([Matrix.of(8, 8), Matrix.of(8, 16)], 90)
    [2, 2]
    """

    def spent(ratio: float) -> int:
        return sum(matrix.cost(matrix.at(ratio)) for matrix in matrices)

    if spent(0.0) > limit:
        raise ValueError(
            f"allocate needs a limit of at least {spent(0.0)} parameters, got {limit}; raise it"
        )
    low, high = 0.0, 1.0
    for _ in range(50):  # 2⁻⁵⁰ is finer than any step of r / min(m, n)
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= limit else (low, middle)
    ranks = [matrix.at(low) for matrix in matrices]
    return fill(matrices, ranks, limit - spent(low))


def fill(matrices: list[Matrix], ranks: list[int | None], slack: int) -> list[int | None]:
    """Spend `slack` on steps of one rank, smallest resulting ratio first, until no step fits."""
    ranks = list(ranks)
    queue: list[tuple[float, int]] = []

    def push(i: int) -> None:
        rank, matrix = ranks[i], matrices[i]
        if rank is not None:
            heapq.heappush(queue, ((rank + matrix.step) / min(matrix.m, matrix.n), i))

    for i in range(len(matrices)):
        push(i)
    while queue:
        _, i = heapq.heappop(queue)
        rank, matrix = ranks[i], matrices[i]
        assert rank is not None
        price = matrix.cost(matrix.after(rank)) - matrix.cost(rank)
        if price <= slack:
            ranks[i], slack = matrix.after(rank), slack - price
            push(i)
    return ranks
