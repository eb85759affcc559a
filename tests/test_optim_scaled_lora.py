"""scaled_lora: the steps of PEFT's create_riemannian_optimizer, and what it refuses."""

import copy

import pytest
import torch
from test_optim_lora import adapted, changes_of, data
from tiny_models import relative

from lowrank_geo.optim import scaled_lora
from lowrank_geo.optim.scaled_lora import scale_gradients

peft = pytest.importorskip("peft")


def run(model, optimizer, dtype=torch.float64):
    x, y = data(dtype)
    losses = []
    for _ in range(5):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("changes", [{}, {"rank_pattern": {"2": 2}}, {"use_dora": True}], ids=str)
def test_the_steps_are_those_of_peft(cls, zero, changes):
    riemannian = pytest.importorskip("peft.optimizers.riemannian")
    model = adapted(zero=zero, **changes)
    twin = copy.deepcopy(model)
    settings = dict(lr=0.02, weight_decay=0.1)
    ours = run(model, scaled_lora(model, cls, reg=1e-2, **settings))
    theirs = run(twin, riemannian.create_riemannian_optimizer(twin, cls, reg=1e-2, **settings))
    assert ours == pytest.approx(theirs, rel=1e-9) and ours[-1] < ours[0]
    for a, b in zip(changes_of(model), changes_of(twin), strict=True):
        assert relative(a, b) < 1e-7  # AdamW divides small gradients by their size


def test_gradients_are_multiplied_by_the_inverse_gram_matrices():
    torch.manual_seed(0)
    B, A = (torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 3), (3, 5)))
    gB, gA = torch.randn(7, 3), torch.randn(3, 5)
    B.grad, A.grad = gB.clone(), gA.clone()
    scale_gradients([(B, A)], 0.1)
    eye = 0.1 * torch.eye(3)
    assert torch.allclose((B.mT @ B + eye) @ A.grad, gA, atol=1e-4)
    assert torch.allclose(B.grad @ (A @ A.mT + eye), gB, atol=1e-4)


def test_half_precision_is_computed_in_single():
    model = adapted(dtype=torch.bfloat16)
    losses = run(model, scaled_lora(model, lr=0.02), torch.bfloat16)
    assert losses[-1] < losses[0]


def test_it_goes_on_bit_for_bit_and_follows_a_schedule():
    model = adapted()
    optimizer = scaled_lora(model, lr=0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    run(model, optimizer)
    schedule.step()
    twin = copy.deepcopy(model)
    again = scaled_lora(twin, lr=0.02)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.param_groups[0]["lr"] == 0.01
    assert run(model, optimizer) == run(twin, again)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="needs a model with trained lora_A and lora_B"):
        scaled_lora(torch.nn.Linear(2, 2), lr=0.1)
    with pytest.raises(ValueError, match="scaled_lora needs reg > 0, got 0.0; pass e.g. 1e-2"):
        scaled_lora(adapted(), lr=0.1, reg=0.0)
    optimizer = scaled_lora(adapted(), lr=0.1)
    with pytest.raises(ValueError, match="takes steps without a closure, got one"):
        optimizer.step(lambda: torch.zeros(()))


@pytest.mark.parametrize(
    "cls, settings, fused",
    [
        (torch.optim.AdamW, {}, True),
        (torch.optim.SGD, {}, True),
        (torch.optim.AdamW, {"foreach": True}, None),
        (torch.optim.AdamW, {"fused": False}, False),
        (torch.optim.RMSprop, {}, "none"),
    ],
    ids=str,
)
def test_one_pass_over_memory_where_torch_has_it(cls, settings, fused):
    model = adapted()
    optimizer = scaled_lora(model, cls, lr=0.02, **settings)
    assert optimizer.param_groups[0].get("fused", "none") == fused
    losses = run(model, optimizer)
    assert losses[-1] < losses[0]


def test_pairs_of_many_shapes_and_frozen_halves_are_scaled_each_by_its_own():
    torch.manual_seed(0)
    shapes = [(7, 3, 5), (6, 2, 4), (7, 3, 5), (9, 3, 5)]
    pairs = [
        (torch.nn.Parameter(torch.randn(m, r)), torch.nn.Parameter(torch.randn(r, n)))
        for m, r, n in shapes
    ]
    for index, (B, A) in enumerate(pairs):
        B.grad, A.grad = torch.randn_like(B), None if index == 2 else torch.randn_like(A)
    before = [(B.grad.clone(), None if A.grad is None else A.grad.clone()) for B, A in pairs]
    scale_gradients(pairs, 0.1)
    for (B, A), (gB, gA) in zip(pairs, before, strict=True):
        eye = 0.1 * torch.eye(B.shape[1])
        assert torch.allclose(B.grad @ (A @ A.mT + eye), gB, atol=1e-4)
        assert (A.grad is None) == (gA is None)
        if gA is not None:
            assert torch.allclose((B.mT @ B + eye) @ A.grad, gA, atol=1e-4)
