"""LoRAPreconditioned: the manifold step on plain A and B, against the same step on U S Vᵀ."""

import copy
import pickle

import pytest
import torch
from tiny_models import relative
from torch import nn

from lowrank_geo.geometry import Point, Tangent, embed, project
from lowrank_geo.geometry import to_dense as dense
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import (
    LoRAPreconditioned,
    RiemannianAdam,
    RiemannianMuon,
    RiemannianSGD,
    param_groups,
)
from lowrank_geo.optim.lora_gradients import divided, give_gradients
from lowrank_geo.optim.lora_pairs import lora_pairs

peft = pytest.importorskip("peft")


def adapted(*, zero=True, dtype=torch.float64, **changes):
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6)).to(
        dtype
    )
    settings = dict(r=3, lora_alpha=6, target_modules=["0", "2", "4"], init_lora_weights=zero)
    return peft.get_peft_model(
        net, peft.LoraConfig(**settings | changes), autocast_adapter_dtype=False
    )


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(6)
    return (torch.randn(32, n, generator=generator, dtype=torch.float64).to(dtype) for n in (8, 6))


def changes_of(model):
    return [
        m.get_delta_weight("default").detach()
        for m in model.modules()
        if hasattr(m, "lora_A") and hasattr(m, "r")
    ]


@pytest.mark.parametrize("zero", [True, False])
def test_the_factors_are_turned_and_their_product_kept(zero):
    model = adapted(zero=zero)
    before = changes_of(model)
    LoRAPreconditioned(model, lr=0.1)
    for old, new in zip(before, changes_of(model), strict=True):
        assert (new - old).abs().max() < 1e-14
    for pair in lora_pairs(model):
        assert (pair.A @ pair.A.mT - torch.eye(3)).abs().max() < 1e-13


@pytest.mark.parametrize("make", [RiemannianSGD, RiemannianAdam, RiemannianMuon])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_steps_are_those_of_a_layer_that_is_u_s_v(make, weight_decay):
    model, (x, y) = adapted(zero=False), data()
    optimizer = LoRAPreconditioned(model, make, lr=0.02, weight_decay=weight_decay, damping=1e-9)
    base = [
        copy.deepcopy(m.base_layer)
        for m in model.modules()
        if hasattr(m, "lora_A") and hasattr(m, "r")
    ]
    points = [Point(*(p.detach().clone() for p in pair.point)) for pair in optimizer.pairs]
    layers = nn.ModuleList(LowRankLinear.from_point(p) for p in points)
    twin = make(param_groups(layers, lr=0.02, weight_decay=weight_decay))
    for _ in range(4):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        h = x
        for index, (linear, layer) in enumerate(zip(base, layers, strict=True)):
            h = linear(h) + layer(h)
            h = torch.tanh(h) if index < 2 else h
        (h - y).square().mean().backward()
        twin.step()
        twin.zero_grad()
    for change, layer in zip(changes_of(model), layers, strict=True):
        assert relative(change, dense(layer.point).detach()) < 1e-9


def test_the_gradient_given_is_the_projection_of_the_dense_one():
    model, (x, y) = adapted(zero=False), data()
    optimizer = LoRAPreconditioned(model, RiemannianSGD, lr=0.1, damping=1e-9)
    linear = model.base_model.model[0].base_layer
    linear.weight.requires_grad_()
    (model(x) - y).square().mean().backward()
    pair = optimizer.pairs[0]
    give_gradients([pair], 1e-9)
    point = Point(*(p.detach() for p in pair.point))
    found = Tangent(*(p.grad for p in pair.point))
    wanted = project(point, linear.weight.grad)
    assert relative(embed(point, found), embed(point, wanted)) < 1e-9


def test_division_by_a_singular_core_is_bounded_and_zero_at_zero():
    S = torch.zeros(2, 3, 3, dtype=torch.float64)
    S[0, 0, 0] = 2.0
    K = torch.randn(2, 5, 3, dtype=torch.float64)
    found = divided(K @ S, S, 1e-3)
    assert torch.allclose(found[0, :, 0], K[0, :, 0], rtol=1e-5)
    assert found[0, :, 1:].abs().max() < 1e-12 and found[1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [RiemannianSGD, RiemannianAdam, RiemannianMuon])
def test_training_from_zero_descends(make, dtype):
    model, (x, y) = (
        adapted(dtype=dtype, modules_to_save=["4"], target_modules=["0", "2"]),
        data(dtype),
    )
    rates = {RiemannianSGD: 0.5, RiemannianAdam: 0.02, RiemannianMuon: 0.05}
    optimizer = LoRAPreconditioned(model, make, lr=rates[make], euclidean_lr=1e-3)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(c.norm() > 0 for c in changes_of(model))


def test_its_state_is_plain_tensors_and_goes_on_bit_for_bit(tmp_path):
    def trained(steps, state=None, weights=None):
        model, (x, y) = adapted(modules_to_save=["4"], target_modules=["0", "2"]), data()
        if weights:
            model.load_state_dict(weights)
        optimizer = LoRAPreconditioned(model, lr=0.05)
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = trained(3)
    torch.save([optimizer.state_dict(), model.state_dict()], tmp_path / "state")
    state, weights = torch.load(tmp_path / "state", weights_only=True)
    resumed, _ = trained(3, state, weights)
    straight, _ = trained(6)
    for a, b in zip(resumed.state_dict().values(), straight.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pickled", [True, False], ids=["pickle", "deepcopy"])
def test_a_copy_continues_bit_for_bit(pickled):
    model, (x, y) = adapted(modules_to_save=["4"], target_modules=["0", "2"]), data()

    def train(model, optimizer):
        for _ in range(3):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    pair = model, LoRAPreconditioned(model, lr=0.05)
    train(*pair)
    copied = pickle.loads(pickle.dumps(pair)) if pickled else copy.deepcopy(pair)
    train(*pair)
    train(*copied)
    weights, theirs = (each[0].state_dict().values() for each in (pair, copied))
    assert all(map(torch.equal, weights, theirs))
    states = (
        [v for s in each[1].state_dict()["state"].values() for v in s.values()]
        for each in (pair, copied)
    )
    assert all(map(torch.equal, *states))


def test_a_schedule_of_the_learning_rate_is_followed():
    model, (x, y) = adapted(), data()
    optimizer = LoRAPreconditioned(model, RiemannianSGD, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = changes_of(model)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(before, changes_of(model), strict=True))


def test_what_is_no_plain_lora_is_refused():
    with pytest.raises(ValueError, match="needs plain LoRA, got DoRA at"):
        LoRAPreconditioned(adapted(use_dora=True), lr=0.1)
    with pytest.raises(ValueError, match="with trained lora_A and lora_B matrices, got none"):
        LoRAPreconditioned(nn.Linear(3, 3), lr=0.1)
    with pytest.raises(TypeError, match="needs an optimizer of lowrank_geo.optim, got AdamW"):
        LoRAPreconditioned(adapted(), lambda groups, **settings: torch.optim.AdamW(groups), lr=0.1)


def of_other_ranks(state):
    return LoRAPreconditioned(adapted(r=2), lr=0.1).state_dict()


def ends_badly(state):
    last = max(key for key, value in state["state"].items() if "U" in value)
    return {**state, "state": {**state["state"], last: {}}}


def of_fewer_layers(state):
    (group, *_), shorter = state["param_groups"], copy.deepcopy(state)
    shorter["param_groups"] = [{**group, "params": group["params"][:-3]}]
    return shorter


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (of_other_ranks, r"load_state_dict needs U of shape \(8, 3\), got \(8, 2\)"),
        (ends_badly, r"load_state_dict needs U of shape .*, got nothing"),
        (of_fewer_layers, r"needs the state of \d+ parameters, got that of \d+"),
        (lambda state: {}, r"needs a dict with state and param_groups, got one of \[\]"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil, sentence):
    (x, y), trained = data(), adapted()
    optimizer = LoRAPreconditioned(trained, RiemannianSGD, lr=0.1)
    (trained(x) - y).square().mean().backward()
    optimizer.step()
    model = adapted()
    fresh = LoRAPreconditioned(model, RiemannianSGD, lr=0.1)
    before, kept = changes_of(model), copy.deepcopy(fresh.state_dict()["state"])
    with pytest.raises(ValueError, match=sentence):
        fresh.load_state_dict(spoil(optimizer.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(before, changes_of(model), strict=True))
    for key, mine in fresh.state_dict()["state"].items():
        assert all(torch.equal(value, kept[key][name]) for name, value in mine.items())
