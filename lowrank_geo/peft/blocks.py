"""Blocks of rows of a fused weight, named by an einops pattern: each gets factors of its own.

"(p h d) n -> p (h d) n" with p = 3 splits a matrix of queries, keys and values into three of rank r; "(p h d) n ->
(p h) d n" splits it into one for each head. The rows are split, the inputs n stay whole.
"""

import re
from typing import NamedTuple

from einops import EinopsError, rearrange
from torch import Tensor


class Blocks(NamedTuple):
    """A pattern `rows n -> blocks rows n`, with the sizes that it does not imply."""

    pattern: str
    sizes: dict[str, int]

    def split_rows(self, W: Tensor) -> Tensor:
        """The blocks of a matrix.

        Shapes: (m, n) -> (b, m / b, n).
        Raises: ValueError for a pattern that does not split m rows into equal blocks.
        """
        sides = self._sides()
        if [len(side) for side in sides] != [2, 3] or sides[0][1] != sides[1][2]:
            raise ValueError(
                f"`block_patterns` needs a pattern 'rows n -> blocks rows n' that leaves the inputs whole, got "
                f"{self.pattern!r}. Please split the rows only."
            )
        try:
            return rearrange(W, self.pattern, **self.sizes)
        except EinopsError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"`block_patterns` needs a pattern that fits a matrix of shape {tuple(W.shape)}, got "
                f"{self.pattern!r} with sizes {self.sizes} ({reason}). Please check the pattern and its sizes."
            ) from error

    def join_rows(self, blocks: Tensor) -> Tensor:
        """The matrix with these blocks.

        Shapes: (b, m / b, n) -> (m, n).
        """
        left, right = self.pattern.split("->")
        return rearrange(blocks, f"{right} -> {left}", **self.sizes)

    def join(self, outputs: Tensor) -> Tensor:
        """The outputs of the matrix from those of its blocks.

        Shapes: (b, ..., m / b) -> (..., m).
        """
        (rows, _), (block, inner, _) = self._sides()
        return rearrange(outputs, f"{block} ... {inner} -> ... {rows}", **self.sizes)

    def _sides(self) -> list[list[str]]:
        """The axes on both sides, those in parentheses as one."""
        return [re.findall(r"\([^()]*\)|[^\s()]+", side) for side in self.pattern.split("->")]
