"""functional.add_lowrank_linear: the formula, its gradients, precisions, and what it leaves alone."""

import pytest
import torch
from tiny_models import relative

from lowrank_geo import geometry
from lowrank_geo.functional import add_lowrank_linear, lowrank_linear
from lowrank_geo.geometry import Tangent, embed, project, to_dense
from lowrank_geo.layers import LowRankLinear

TOL = 2e-14  # ten times the worst of 40 draws


def problem(tokens, dtype=torch.float64):
    """y (2, tokens, 9), x (2, tokens, 7) and a point of rank 3."""
    torch.manual_seed(tokens)
    point = geometry.random(9, 7, 3, dtype=torch.promote_types(dtype, torch.float32))
    y, x = torch.randn(2, tokens, 9, dtype=dtype), torch.randn(2, tokens, 7, dtype=dtype)
    return y.requires_grad_(), x.requires_grad_(), point


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_it_is_the_sum_with_the_partial_derivatives(tokens, scale):
    y, x, point = problem(tokens)
    factors = [p.clone().requires_grad_() for p in point]
    found = add_lowrank_linear(y, x, *factors, scale=scale)
    wanted = y + scale * x @ (factors[0] @ factors[1] @ factors[2].mT).mT
    weight = torch.randn_like(found)
    inputs = [y, x, *factors]
    pairs = zip(
        torch.autograd.grad(found, inputs, weight),
        torch.autograd.grad(wanted, inputs, weight),
        strict=True,
    )
    assert relative(found, wanted) < TOL and all(relative(a, b) < TOL for a, b in pairs)


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_tangent_gradients_are_the_projected_gradient(tokens, scale):
    y, x, point = problem(tokens)
    factors = [p.clone().requires_grad_() for p in point]
    found = add_lowrank_linear(y, x, *factors, scale=scale, gradient="tangent")
    W = to_dense(point).requires_grad_()
    wanted = y + scale * x @ W.mT
    weight = torch.randn_like(found)
    dy, dx, *xi = torch.autograd.grad(found, [y, x, *factors], weight)
    ey, ex, G = torch.autograd.grad(wanted, [y, x, W], weight)
    assert relative(found, wanted) < TOL and torch.equal(dy, ey) and relative(dx, ex) < TOL
    assert relative(embed(point, Tangent(*xi)), embed(point, project(point, G))) < TOL


@pytest.mark.parametrize("gradient", ["factors", "tangent"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_zero_core_leaves_every_bit(gradient, dtype):
    y, x, point = problem(5, dtype)
    U, S, V = point
    found = add_lowrank_linear(y, x, U, torch.zeros_like(S), V, gradient=gradient)
    assert found.dtype == dtype and torch.equal(found, y)


@pytest.mark.parametrize("gradient", ["factors", "tangent"])
def test_precisions_may_differ_and_the_sum_is_not_changed_in_place(gradient):
    y, x, point = problem(5, torch.float32)
    before = y.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        found = add_lowrank_linear(y, x, *point, gradient=gradient)
        wanted = y + lowrank_linear(x, *point, gradient=gradient)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert torch.equal(y, before)


def test_a_layer_adds_its_bias_too():
    layer = LowRankLinear(7, 9, 3).double()
    y, x, _ = problem(4)
    assert relative(layer.add_to(y, x, 0.5), y + 0.5 * layer(x)) < TOL


def test_inputs_of_another_layer_are_refused():
    y, x, point = problem(4)
    with pytest.raises(ValueError, match="needs x with last dimension 7, got"):
        add_lowrank_linear(y, x[..., :5], *point)
    with pytest.raises(ValueError, match="needs gradient 'factors' or 'tangent', got 'both'"):
        add_lowrank_linear(y, x, *point, gradient="both")
    loss = add_lowrank_linear(
        y, x, *(p.requires_grad_() for p in point), gradient="tangent"
    ).square()
    (dx,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="factors"):
        torch.autograd.grad(dx.sum(), x)
