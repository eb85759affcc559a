"""One list of optimizers × one list of checks."""

import copy
import io
import math
import pickle

import pytest
import torch
from optimizer_list import (
    Net,
    backward,
    every_invariant_optimizer,
    every_optimizer,
    run,
    snapshot,
    states,
)
from torch import nn

from lowrank_geo.geometry import Point, Tangent, gauge, norm
from lowrank_geo.layers import LowRankLinear, lowrank_layers
from lowrank_geo.optim import RiemannianMuon, RiemannianSGD, param_groups
from lowrank_geo.optim.schedules import warmup_stable_decay


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def data():
    x = torch.randn(64, 8)
    return x, torch.tanh(x @ torch.randn(8, 4))


@every_optimizer
def test_descends_and_stays_on_the_manifold(make, net, data):
    losses = run(net, make(param_groups(net)), data, 150)
    assert losses[-1] < 0.6 * losses[0]
    for _, layer in lowrank_layers(net):
        for frame in (layer.U, layer.V):
            assert (frame.mT @ frame - torch.eye(layer.rank)).abs().max() < 1e-5


@every_optimizer
def test_momentum_is_a_tangent_vector_at_the_current_point(make, net, data):
    optimizer = make(param_groups(net))
    run(net, optimizer, data, 7)
    for name, layer in lowrank_layers(net):
        # Methods whose bases carry no momentum store that of the core alone.
        momentum = Tangent(
            *(optimizer.state[p].get("momentum", torch.zeros_like(p)) for p in layer.point)
        )
        leak = gauge(layer.point, momentum)
        assert norm(Tangent(*(a - b for a, b in zip(leak, momentum, strict=True)))) < 1e-6 * (
            1 + norm(momentum)
        ), name


@every_optimizer
def test_zero_step_changes_nothing(make, net, data):
    optimizer = make(param_groups(net, lr=0.0, euclidean_lr=0.0, weight_decay=0.1))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before, fresh = snapshot(net), states(optimizer)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(states(optimizer), fresh, strict=True))


@every_optimizer
def test_zero_learning_rate_as_a_tensor_keeps_the_point(make, net, data):
    optimizer = make(param_groups(net, lr=torch.tensor(0.0), euclidean_lr=torch.tensor(0.0)))
    before = snapshot(net)
    run(net, optimizer, data, 2)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@every_optimizer
def test_gradients_are_never_written_to(make, net, data):
    optimizer = make(param_groups(net, weight_decay=0.1))
    backward(net, data)
    before = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    optimizer.step()
    assert all(torch.equal(net.get_parameter(n).grad, g) for n, g in before.items())


@every_optimizer
def test_layers_without_gradient_are_left_alone(make, net, data):
    optimizer = make(param_groups(net, weight_decay=0.1))
    before = [p.detach().clone() for p in net.unused.parameters()]
    run(net, optimizer, data, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.unused.parameters(), before, strict=True))


@every_optimizer
def test_state_dict_round_trip_continues_bit_for_bit(make, net, data):
    optimizer = make(param_groups(net, weight_decay=0.1))
    run(net, optimizer, data, 3)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(net, optimizer, data, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Net()
    again.load_state_dict(saved["net"])
    resumed = make(param_groups(again, weight_decay=0.1))
    resumed.load_state_dict(saved["optimizer"])
    run(again, resumed, data, 3)
    expected = snapshot(net)
    assert all(torch.equal(p, expected[name]) for name, p in again.named_parameters())
    for ours, theirs in zip(states(resumed), states(optimizer), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@every_optimizer
def test_a_copy_continues_bit_for_bit_and_on_its_own(make, net, data, duplicate):
    optimizer = make(param_groups(net, weight_decay=0.1))
    warmup_stable_decay(optimizer, 10)  # hangs a function of its own on the optimizer
    run(net, optimizer, data, 3)
    other, copied = duplicate((net, optimizer))
    assert type(copied) is type(optimizer) and copied.transports() == optimizer.transports()
    kept = snapshot(other)
    run(net, optimizer, data, 3)
    assert all(torch.equal(p, kept[name]) for name, p in other.named_parameters())
    run(other, copied, data, 3)
    expected = snapshot(net)
    assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())
    for ours, theirs in zip(states(copied), states(optimizer), strict=True):
        assert torch.equal(ours, theirs)
    # And with groups that are added later.
    late = LowRankLinear(4, 4, 2)
    copied.add_param_group(param_groups(late)[0])


@every_optimizer
def test_a_copy_without_its_model_takes_the_same_step(make, net, data):
    optimizer = make(param_groups(net))
    run(net, optimizer, data, 2)
    copied = copy.deepcopy(optimizer)
    backward(net, data)
    pairs = [
        (p, q)
        for ours, theirs in zip(copied.param_groups, optimizer.param_groups, strict=True)
        for p, q in zip(ours["params"], theirs["params"], strict=True)
    ]
    for p, q in pairs:
        p.grad = None if q.grad is None else q.grad.clone()
    optimizer.step()
    copied.step()
    assert all(torch.equal(p, q) for p, q in pairs)


def test_a_copy_of_a_compiled_optimizer_is_compiled(net, data):
    optimizer = RiemannianSGD(param_groups(net), lr=0.05)
    optimizer.compile(backend="eager")
    run(net, optimizer, data, 1)
    other, copied = pickle.loads(pickle.dumps((net, optimizer)))
    assert "_propose_step" in vars(copied)
    run(net, optimizer, data, 1)
    run(other, copied, data, 1)
    expected = snapshot(net)
    assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())


@every_optimizer
def test_batches_of_one_shape_equal_single_matrices(make, net, data):
    """Stacking is an implementation detail: a net trained layer by layer in groups of its own is the same."""
    net, data = net.double(), tuple(x.double() for x in data)
    alone = copy.deepcopy(net)
    batched = make(param_groups(net))
    groups = param_groups(alone)
    points = [list(layer.point) for _, layer in lowrank_layers(alone)]
    single = make([{"params": p, "geometry": "fixed_rank"} for p in points] + groups[1:])
    run(net, batched, data, 5)
    run(alone, single, data, 5)
    expected = snapshot(net)
    for name, p in alone.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-10, atol=1e-12, msg=name)


@every_invariant_optimizer
def test_trajectory_is_gauge_invariant(make, net, data):
    """(UQ, QᵀSP, VP) is the same matrix and must train the same; float64, worst of 11 x 10 draws 4e-13."""
    net, data = net.double(), tuple(x.double() for x in data)
    turned = copy.deepcopy(net)
    for _, layer in lowrank_layers(turned):
        r = layer.rank
        Q, P = (torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0] for _ in range(2))
        layer.U.data, layer.V.data = layer.U @ Q, layer.V @ P
        layer.S.data = Q.mT @ layer.S @ P
    run(net, make(param_groups(net)), data, 10)
    run(turned, make(param_groups(turned)), data, 10)
    for (name, a), (_, b) in zip(lowrank_layers(net), lowrank_layers(turned), strict=True):
        assert (a.weight - b.weight).abs().max() < 4e-12, name


@every_optimizer
def test_starts_from_a_zero_core(make, net, data):
    for _, layer in lowrank_layers(net):
        layer.S.data.zero_()
    optimizer = make(param_groups(net))
    run(net, optimizer, data, 3)
    assert net.third.S.abs().max() > 0
    assert all(torch.isfinite(p).all() for p in net.parameters())


@every_optimizer
def test_tensor_learning_rate_equals_float(make, net, data):
    other = copy.deepcopy(net)
    run(net, make(param_groups(net, lr=0.02, euclidean_lr=0.01)), data, 4)
    rates = {"lr": torch.tensor(0.02), "euclidean_lr": torch.tensor(0.01)}
    run(other, make(param_groups(other, **rates)), data, 4)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_closure_runs_once_with_gradients_on(make, net, data):
    optimizer = make(param_groups(net))
    calls = []
    loss = optimizer.step(
        closure=lambda: calls.append(torch.is_grad_enabled()) or backward(net, data)
    )
    assert calls == [True] and loss > 0


@every_optimizer
def test_schedulers_drive_every_group(make, net, data):
    optimizer = make(param_groups(net))
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = warmup_stable_decay(optimizer, 10, warmup=0.5, decay=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([p / 5 for p in peaks])
    run(net, optimizer, data, 1)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2 * p / 5 for p in peaks])


@every_optimizer
def test_grad_scaler_skips_an_infinite_step_and_takes_a_finite_one(make, net, data):
    optimizer = make(param_groups(net))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    reference = copy.deepcopy(net)
    run(reference, make(param_groups(reference)), data, 1)
    backward(net, data, scale=8.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    for a, b in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    before, kept = snapshot(net), states(optimizer)
    backward(net, data)
    net.first.S.grad[0, 0] = math.inf
    scaler.step(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(states(optimizer), kept, strict=True))


@every_optimizer
def test_a_group_added_later_trains(make, net, data):
    late = LowRankLinear(4, 4, 2)
    optimizer = make(param_groups(net))
    optimizer.add_param_group(param_groups(late)[0])
    before = late.S.detach().clone()
    late(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(late.S, before)


@every_optimizer
def test_deepcopied_model_and_new_optimizer_are_independent(make, net, data):
    optimizer = make(param_groups(net))
    twin = copy.deepcopy(net)
    before = snapshot(twin)
    run(net, optimizer, data, 2)
    assert all(torch.equal(p, before[name]) for name, p in twin.named_parameters())


def test_clipping_clips_the_riemannian_norm(net, data):
    """√(|Up|² + |M|² + |Vp|²) is the norm of the projected dense gradient, by the definition of the metric."""
    param_groups(net)
    backward(net, data)
    point = Point(*(p.detach() for p in net.third.point))
    xi = Tangent(*(p.grad for p in net.third.point))
    ambient = (point.U @ xi.M + xi.Up) @ point.V.mT + point.U @ xi.Vp.mT
    total = torch.nn.utils.clip_grad_norm_(list(net.third.point), 1e-3)
    assert total == pytest.approx(ambient.norm().item(), rel=1e-5)


def test_transports_are_named_and_at_most_one(net, data):
    optimizer = RiemannianSGD(param_groups(net), lr=0.5)
    run(net, optimizer, data, 3)
    found = optimizer.transports()
    assert set(found) == {"first", "second", "third"}
    assert all(0 < tau <= 1 + 1e-6 for tau in found.values()) and min(found.values()) < 1


def test_weight_decay_shrinks_the_matrix_and_spares_vectors(net):
    optimizer = RiemannianSGD(param_groups(net, lr=0.5, euclidean_lr=0.5, weight_decay=0.2))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    W, scale = net.first.weight.detach(), net.norm.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(net.first.weight, 0.9 * W)
    assert torch.equal(net.norm.weight, scale)


def test_low_precision_parameters_keep_float32_state():
    linear = nn.Linear(6, 6).bfloat16()
    optimizer = RiemannianMuon(linear.parameters(), lr=0.01)
    linear(torch.randn(4, 6).bfloat16()).sum().backward()
    optimizer.step()
    kinds = {k: v.dtype for k, v in optimizer.state[linear.weight].items()}
    assert set(kinds.values()) == {torch.float32}
    other = RiemannianMuon(linear.parameters(), lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    assert {v.dtype for v in other.state[linear.weight].values()} == {torch.float32}
