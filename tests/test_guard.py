"""guard: optimizers that would misread tangent gradients raise before they move anything."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lowrank_geo import guard
from lowrank_geo.layers import LowRankLinear

SENTENCE = (
    r"AdamW\.step needs ordinary gradients, got tangent gradients of a low-rank layer .*; "
    r"use an optimizer of lowrank_geo\.optim, or set layer\.gradient = 'factors'"
)


@pytest.fixture
def layer():
    layer = LowRankLinear(5, 4, 2)
    layer.gradient = "tangent"
    return layer


def backward(module):
    module(torch.randn(3, 5)).square().sum().backward()


def step(module, **options):
    torch.optim.AdamW(module.parameters(), **options).step()


def assert_guarded(module):
    assert all(guard.is_marked(x) for x in (module.U, module.S, module.V))
    assert not guard.is_marked(module.bias)
    backward(module)
    before = [x.detach().clone() for x in module.parameters()]
    with pytest.raises(RuntimeError, match=SENTENCE):
        step(module)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


def test_foreign_optimizer_raises_and_moves_nothing(layer):
    assert_guarded(layer)


@pytest.mark.parametrize("options", [dict(fused=True), dict(foreach=True), dict(capturable=False)])
def test_every_implementation_of_a_foreign_optimizer_raises(layer, options):
    backward(layer)
    with pytest.raises(RuntimeError, match=SENTENCE):
        step(layer, **options)


def test_foreign_optimizer_raises_whose_closure_computes_the_gradients(layer):
    # The gradients do not exist yet when the hook runs.
    def closure():
        loss = layer(torch.ones(3, 5)).square().sum()
        loss.backward()
        return loss

    for optimizer in (torch.optim.AdamW(layer.parameters()), torch.optim.LBFGS(layer.parameters())):
        with pytest.raises(RuntimeError, match="needs ordinary gradients, got tangent gradients"):
            optimizer.step(closure)
        with pytest.raises(RuntimeError, match="needs ordinary gradients, got tangent gradients"):
            optimizer.step(closure=closure)


def test_optimizer_that_reads_tangent_gradients_steps(layer):
    class Reader(torch.optim.SGD):
        reads_tangent_gradients = True

    backward(layer)
    before = layer.U.detach().clone()
    Reader(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer.U, before)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: copy.deepcopy(nn.Sequential(layer))[0],
        lambda layer: layer.double().float(),
        lambda layer: layer.to_empty(device="cpu").requires_grad_(),
    ],
    ids=["deepcopy", "pickle", "deepcopy of a model", "double and back", "to_empty"],
)
def test_copies_and_casts_are_guarded_too(layer, duplicate):
    module = duplicate(layer)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.eye(*x.shape) if x.dim() == 2 else torch.zeros_like(x))
    assert module.gradient == "tangent"
    assert_guarded(module)


def test_parameters_assigned_from_a_state_dict_are_guarded_too(layer):
    state = {name: x.clone() for name, x in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert_guarded(layer)


def test_factors_mode_lifts_the_guard(layer):
    layer.gradient = "factors"
    assert not any(guard.is_marked(x) for x in layer.point)
    backward(layer)
    before = layer.U.detach().clone()
    step(layer, lr=1e-5)  # so small that the frame is still accepted below
    assert not torch.equal(layer.U, before)
    layer.gradient = "tangent"
    assert_guarded(layer)


def test_change_of_meaning_drops_the_gradients_of_the_old_meaning(layer):
    # Following the advice of the error and stepping again must not use tangent coordinates.
    backward(layer)
    layer.gradient = "factors"
    assert all(x.grad is None for x in layer.point) and layer.bias.grad is not None
    backward(layer)
    layer.gradient = "factors"
    assert all(x.grad is not None for x in layer.point)


def test_unused_parameters_do_not_raise(layer):
    used = LowRankLinear(5, 4, 2)
    backward(used)
    model = nn.ModuleList([layer, used])
    step(model)
    step(layer)


def test_marks_are_of_objects_not_of_equal_tensors():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    guard.mark([a])
    assert guard.is_marked(a) and not guard.is_marked(b)
    guard.unmark([a, b])
    assert not guard.is_marked(a)


def test_marks_die_with_their_parameters():
    before = len(guard._tangent)
    parameter = nn.Parameter(torch.zeros(2))
    guard.mark([parameter])
    assert len(guard._tangent) == before + 1
    del parameter
    assert len(guard._tangent) == before
