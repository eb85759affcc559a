"""Series over rooted trees, and the flow of a vector field given by one.

A rooted tree τ stands for an elementary differential of f: a single vertex for f, and a vertex with the children
τ₁ … τₘ for f⁽ᵐ⁾(F(τ₁), …, F(τₘ)). A vector field Σ c(τ) F(τ) is its vector of coefficients c.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

Tree = tuple  # of trees, sorted; () is the single vertex
LARGEST_ORDER = 8  # 200 trees; the count triples with every order


def vertices(tree: Tree) -> int:
    """The number of vertices, which is the order of the differential.

    >>> vertices(((), ((),)))
    4
    """
    return 1 + sum(map(vertices, tree))


def graft(branch: Tree, tree: Tree) -> Iterator[Tree]:
    """`branch` hung from every vertex of `tree` in turn: the derivative of F(tree) along F(branch).

    >>> sorted(graft((), ((),)))
    [((), ()), (((),),)]
    """
    yield tuple(sorted((*tree, branch)))
    for place, child in enumerate(tree):
        rest = tree[:place] + tree[place + 1 :]
        for grown in graft(branch, child):
            yield tuple(sorted((*rest, grown)))


class Forest(NamedTuple):
    """All trees of up to `order` vertices, by size, and what grafting makes of each pair of them."""

    trees: list[Tree]
    sizes: np.ndarray  # (trees)
    branch: np.ndarray  # (entries), index of the grafted tree
    trunk: np.ndarray  # (entries), index of the tree it is hung to
    grown: np.ndarray  # (entries), index of the result

    def leaf(self) -> np.ndarray:
        """The series of f itself."""
        return (self.sizes == 1).astype(float)

    def along(self, field: np.ndarray, series: np.ndarray) -> np.ndarray:
        """The derivative G'F of a series G along a field F.

        Shapes: (trees), (trees) -> (trees).
        """
        products = field[self.branch] * series[self.trunk]
        return np.bincount(self.grown, products, len(self.trees))

    def pull(self, field: np.ndarray, series: np.ndarray, time: float) -> np.ndarray:
        """G after the flow of F for `time`: Σ timeⁿ/n! (G'F)ⁿ, exact up to the order of the forest.

        Shapes: (trees), (trees) -> (trees).
        """
        total = term = series
        for n in range(1, int(self.sizes[-1]) + 1):
            term = time / n * self.along(field, term)
            total = total + term
        return total

    def displacement(self, field: np.ndarray, time: float = 1.0) -> np.ndarray:
        """How far the flow of F moves a point in `time`: exp(time·F) − id.

        Shapes: (trees) -> (trees).
        """
        total = term = time * field
        for n in range(2, int(self.sizes[-1]) + 1):
            term = time / n * self.along(field, term)
            total = total + term
        return total

    def generator(self, displacement: np.ndarray) -> np.ndarray:
        """The field whose flow for a time of 1 is the map x + displacement(x): the inverse of `displacement`.

        Shapes: (trees) -> (trees).
        """
        field = displacement
        for _ in range(int(self.sizes[-1]) - 1):  # each pass is right for one more order
            field = displacement - (self.displacement(field) - field)
        return field


@cache
def forest(order: int) -> Forest:
    """The trees of up to `order` vertices.

    >>> len(forest(4).trees)
    8
    """
    layers: list[list[Tree]] = [[()]]
    for _ in range(order - 1):
        layers.append(sorted({grown for tree in layers[-1] for grown in graft((), tree)}))
    trees = [tree for layer in layers for tree in layer]
    place = {tree: at for at, tree in enumerate(trees)}
    entries = [
        (place[branch], place[trunk], place[grown])
        for branch in trees
        for trunk in trees
        if vertices(branch) + vertices(trunk) <= order
        for grown in graft(branch, trunk)
    ]
    columns = np.array(entries, dtype=int).reshape(-1, 3).T
    return Forest(trees, np.array([vertices(tree) for tree in trees]), *columns)
