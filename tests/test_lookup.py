"""lowrank_embedding: rows of Wᵀ, its two gradients against the dense table, its refusals."""

import pytest
import torch
import torch.nn.functional as F

from lowrank_geo.geometry import Point, Tangent, embed, project, to_dense
from lowrank_geo.lookup import lowrank_embedding

INDICES = torch.tensor([[3, 0, 3], [7, 1, 6]])


def rows(point, indices):
    W = to_dense(point)
    return W.mT if indices is None else W.mT[indices]


@pytest.mark.parametrize("indices", [INDICES, None], ids=["some", "all"])
@pytest.mark.parametrize("gradient", ["factors", "tangent"])
def test_the_rows_are_those_of_the_dense_table(point, indices, gradient):
    p = point(5, 8, 2)
    found = lowrank_embedding(indices, *p, gradient=gradient)
    assert (found - rows(p, indices)).abs().max() < 1e-14


@pytest.mark.parametrize("core", [None, "singular", "zero"])
@pytest.mark.parametrize("indices", [INDICES, None], ids=["some", "all"])
def test_tangent_gradients_are_the_projection_of_the_dense_gradient(point, indices, core):
    p = point(5, 8, 2, core=core)
    factors = [x.clone().requires_grad_() for x in p]
    target = torch.randn(rows(p, indices).shape, dtype=torch.float64)
    (lowrank_embedding(indices, *factors, gradient="tangent") * target).sum().backward()
    W = to_dense(p).requires_grad_()
    ((W.mT if indices is None else F.embedding(indices, W.mT)) * target).sum().backward()
    found = Tangent(*(x.grad for x in factors))
    assert (embed(p, found) - embed(p, project(p, W.grad))).abs().max() < 1e-13
    assert (p.U.mT @ found.Up).abs().max() < 1e-13 and (p.V.mT @ found.Vp).abs().max() < 1e-13


@pytest.mark.parametrize("indices", [INDICES, None], ids=["some", "all"])
def test_partial_derivatives_are_those_of_finite_differences(point, indices):
    factors = [x.clone().requires_grad_() for x in point(5, 8, 2)]
    assert torch.autograd.gradcheck(lambda *f: lowrank_embedding(indices, *f), factors)


def test_second_derivatives_of_tangent_gradients_are_refused(point):
    factors = [x.clone().requires_grad_() for x in point(5, 8, 2)]
    loss = lowrank_embedding(INDICES, *factors, gradient="tangent").square().sum()
    grads = torch.autograd.grad(loss, factors, create_graph=True)
    with pytest.raises(RuntimeError, match="lowrank_embedding needs gradient='factors' for second"):
        grads[0].sum().backward()


def test_an_unknown_gradient_is_refused(point):
    with pytest.raises(ValueError, match="'factors' or 'tangent', got 'other'"):
        lowrank_embedding(INDICES, *Point(*point(5, 8, 2)), gradient="other")
