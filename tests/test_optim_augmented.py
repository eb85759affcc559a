"""AugmentedAdam and AugmentedHeavyBall: the published cycle, written with matrices that do change their shape."""

import copy
import io

import pytest
import torch
from optimizer_list import Net, backward, run, snapshot, states
from torch._dynamo.utils import counters

from lowrank_geo import diagnostics
from lowrank_geo.layers import LowRankLinear, lowrank_layers
from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.optim import (
    AugmentedAdam,
    AugmentedHeavyBall,
    RiemannianSGD,
    ScheduleFree,
    param_groups,
    reserve,
)

SHAPE, START, LR = (12, 9), 3, 0.02


class Quadratic:
    """½⟨W − W*, A(W − W*)B⟩ in float64, largest curvature 1."""

    def __init__(self, target_rank, condition=4.0):
        def spd(size):
            Q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
            return (Q * torch.linspace(1, 1 / condition, size, dtype=torch.float64)) @ Q.mT

        self.A, self.B = (spd(size) for size in SHAPE)
        U, S, Vt = torch.linalg.svd(torch.randn(*SHAPE, dtype=torch.float64), full_matrices=False)
        sigma = torch.linspace(1, 0.5, target_rank, dtype=torch.float64)
        self.target = (U[:, :target_rank] * sigma) @ Vt[:target_rank]

    def gradient(self, W):
        return self.A @ (W - self.target) @ self.B

    def __call__(self, W):
        return 0.5 * ((W - self.target) * self.gradient(W)).sum()


@pytest.fixture
def layer(point):
    return reserve(LowRankLayer(point(*SHAPE, START), None))


def train(layer, optimizer, quadratic, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        quadratic(layer.matrix()).backward()
        optimizer.step()


def published(point, quadratic, rule, carry, *, batches, inner, tolerance):
    """Algorithm 1 of arXiv 2505.08022, term by term: shapes change, nothing is masked."""
    (U, S, V), phase, state, core_steps = point, 0, None, 0
    for _ in range(batches):
        G = quadratic.gradient(U @ S @ V.mT)
        if phase == 0:
            U1, V1 = basis(U, G @ V), basis(V, G.mT @ U)
            state = carry(state, U1.mT @ U, V1.mT @ V)
            U, S, V = U1, U1.mT @ U @ S @ V.mT @ V1, V1
        else:
            core_steps += 1
            S, state = rule(S, U.mT @ G @ V, state, core_steps)
        if phase == inner:
            P, sigma, Qt = torch.linalg.svd(S)
            tails = [sigma[j:].norm() for j in range(len(sigma) + 1)]
            r = next((j for j, t in enumerate(tails) if t < tolerance * sigma.norm()), len(sigma))
            r = max(2, min(r, START))
            state = carry(state, P[:, :r].mT, Qt[:r])
            U, S, V = U @ P[:, :r], sigma[:r].diag(), V @ Qt[:r].mT
        phase = 0 if phase == inner else phase + 1
    return U @ S @ V.mT


def basis(U, Z):
    """(Pᵀ√v Q)∘² depends on the signs of basis vectors, and the paper does not say which; these are those of U."""
    Q, R = torch.linalg.qr(torch.cat([U, Z], 1))
    return Q * R.diagonal().sign()


def heavy_ball(S, g, m, step):
    m = g if m is None else 0.9 * m + g
    return S - LR * m, m


def carry_momentum(m, M, N):
    return None if m is None else M @ m @ N.mT


def adam(S, g, state, step):
    m, v = (torch.zeros_like(S), torch.zeros_like(S)) if state is None else state
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    hat = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return S - LR * hat, (m, v)


def carry_square_root(state, M, N):
    return state and (M @ state[0] @ N.mT, (M @ state[1].sqrt() @ N.mT) ** 2)


def carry_mixed(state, M, N):
    return state and (M @ state[0] @ N.mT, M**2 @ state[1] @ (N**2).mT)


def aged_adam(S, g, state, step):
    """Each entry has its own count of steps."""
    m, v, age = (torch.zeros_like(S) for _ in range(3)) if state is None else state
    m, v, age = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, age + 1
    hat = (m / (1 - 0.9**age)) / ((v / (1 - 0.999**age)).sqrt() + 1e-8)
    return S - LR * hat, (m, v, age)


def carry_aged(state, M, N):
    return state and (*carry_mixed(state[:2], M, N), M**2 @ state[2] @ (N**2).mT)


METHODS = {
    "heavy ball": (AugmentedHeavyBall, {}, heavy_ball, carry_momentum),
    "adam": (AugmentedAdam, {}, adam, carry_square_root),
    "adam, mixed": (AugmentedAdam, {"second": "mixed"}, adam, carry_mixed),
    "adam, aged": (AugmentedAdam, {"second": "mixed", "age": True}, aged_adam, carry_aged),
}


@pytest.mark.parametrize("cls, settings, rule, carry", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("tolerance", [1e-3, 0.3])
def test_is_the_published_cycle(layer, cls, settings, rule, carry, tolerance):
    """Four cycles of one augmentation and three core steps."""
    quadratic, start = Quadratic(4), [x[:, :START].detach().clone() for x in layer.point]
    start[1] = start[1][:START]
    optimizer = cls(
        param_groups(layer), lr=LR, inner_steps=3, tolerance=tolerance, max_rank=START, **settings
    )
    train(layer, optimizer, quadratic, 16)
    expected = published(start, quadratic, rule, carry, batches=16, inner=3, tolerance=tolerance)
    # 10 times the worst of 20 draws; Adam divides rounding errors by small √v.
    assert (layer.matrix() - expected).abs().max() < (3e-14 if rule is heavy_ball else 4e-8)


@pytest.mark.parametrize("second", ["square-root", "mixed"])
@pytest.mark.parametrize("age", [False, True])
def test_between_augmentations_the_core_has_the_rule_of_torch(point, second, age):
    layer = LowRankLayer(point(*SHAPE, 4), None)
    quadratic, core = Quadratic(4), torch.nn.Parameter(layer.S.detach().clone())
    U, V = layer.U.detach().clone(), layer.V.detach().clone()
    settings = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    ours = AugmentedAdam(param_groups(layer), inner_steps=99, second=second, age=age, **settings)
    theirs = torch.optim.AdamW([core], **settings)
    train(layer, ours, quadratic, 30)
    for _ in range(30):
        theirs.zero_grad()
        quadratic(U @ core @ V.mT).backward()
        theirs.step()
    assert (layer.matrix() - U @ core @ V.mT).abs().max() < 1e-12


def test_the_loss_descends_up_to_the_truncation(layer):
    """Every cycle: L_new ≤ L − Σ lr/2 |∇_S L|² + |∇L|ϑ + ϑ²/2 for lr at most 1 over the largest curvature."""
    quadratic, tolerance, inner = Quadratic(5), 0.1, 4
    optimizer = AugmentedHeavyBall(
        param_groups(layer),
        lr=0.5,
        momentum=0.0,
        inner_steps=inner,
        tolerance=tolerance,
        max_rank=4,
    )
    truncations = 0.0
    for _ in range(12):
        for batch in range(inner + 1):
            W, before = layer.matrix().detach(), quadratic(layer.matrix()).item()
            rank = int(optimizer.state[layer.S]["rank"])
            U, V = (x[:, :rank].detach().clone() for x in (layer.U, layer.V))
            g = U.mT @ quadratic.gradient(W) @ V
            train(layer, optimizer, quadratic, 1)
            after = quadratic(layer.matrix()).item()
            if batch == 0:
                assert after == pytest.approx(before, rel=1e-12)
                continue
            bound = before - 0.25 * g.square().sum().item()
            if batch == inner:
                stepped = W - 0.5 * U @ g @ V.mT
                cut = (layer.matrix().detach() - stepped).norm().item()
                bound += quadratic.gradient(stepped).norm().item() * cut + cut**2 / 2
                truncations += cut
            assert after <= bound + 1e-12
    assert truncations > 0.1 and after < 0.2 * quadratic(torch.zeros(SHAPE, dtype=torch.float64))


def reached(layer, quadratic, steps=400):
    optimizer = AugmentedHeavyBall(
        [{**group, "layers": ["it"]} for group in param_groups(layer)],
        lr=0.3,
        inner_steps=4,
        tolerance=0.02,
    )
    ranks = []
    for _ in range(steps // 5):
        train(layer, optimizer, quadratic, 5)
        ranks.append(optimizer.ranks()["it"])
    return ranks


@pytest.mark.parametrize("target_rank, start", [(4, 1), (2, 4)])
def test_the_rank_grows_and_falls_to_that_of_the_solution(point, target_rank, start):
    quadratic = Quadratic(target_rank)
    layer = reserve(LowRankLayer(point(*SHAPE, start), None), 9 / start)
    ranks = reached(layer, quadratic)
    assert ranks[-1] == target_rank and len(set(ranks)) > 1
    assert (layer.matrix() - quadratic.target).norm() < 0.03 * quadratic.target.norm()


@pytest.mark.parametrize("cls", [AugmentedHeavyBall, AugmentedAdam])
def test_a_state_saved_anywhere_in_the_cycle_continues_bit_for_bit(cls):
    x = torch.randn(64, 8)
    data = x, torch.tanh(x @ torch.randn(8, 4))

    def made(net):
        return cls(param_groups(net), lr=0.03, inner_steps=3, tolerance=0.05)

    net = reserve(Net())
    start, optimizer = copy.deepcopy(net.state_dict()), made(net)
    for steps, phase in enumerate((1, 2, 3, 0, 1), start=1):
        run(net, optimizer, data, 1)
        file = io.BytesIO()
        torch.save([net.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, saved = torch.load(file, weights_only=True)
        again = reserve(Net())
        again.load_state_dict(weights)
        resumed = made(again)
        resumed.load_state_dict(saved)
        assert resumed.param_groups[0]["phase"] == phase
        run(again, resumed, data, 6)
        uninterrupted = reserve(Net())
        uninterrupted.load_state_dict(start)
        twin = made(uninterrupted)
        run(uninterrupted, twin, data, steps + 6)
        expected = snapshot(uninterrupted)
        assert all(torch.equal(p, expected[name]) for name, p in again.named_parameters())
        assert all(torch.equal(a, b) for a, b in zip(states(resumed), states(twin), strict=True))


def test_every_batch_trains_what_is_not_low_rank_and_parameters_stay_the_same_objects():
    net, x = reserve(Net()), torch.randn(64, 8)
    data, parameters = (x, torch.randn(64, 4)), list(net.parameters())
    shapes = [p.shape for p in parameters]
    optimizer = AugmentedAdam(param_groups(net), lr=0.01, inner_steps=2)
    for phase in [0, 1, 2] * 3:
        before = snapshot(net)
        weights = {name: layer.weight.detach() for name, layer in lowrank_layers(net)}
        run(net, optimizer, data, 1)
        for name in ("first.bias", "third.bias", "norm.weight", "norm.bias", "dense.weight"):
            assert not torch.equal(net.get_parameter(name), before[name]), (phase, name)
        moved = (net.first.weight - weights["first"]).abs().max()
        assert moved < 1e-6 if phase == 0 else moved > 1e-4
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert [p.shape for p in net.parameters()] == shapes


def test_a_learning_rate_of_zero_waits_without_using_up_the_cycle():
    net = reserve(Net())
    data = torch.randn(16, 8), torch.randn(16, 4)
    optimizer = AugmentedHeavyBall(param_groups(net, lr=0.0))
    before = snapshot(net)
    run(net, optimizer, data, 2)
    assert optimizer.param_groups[0]["phase"] == 0 and torch.equal(net.first.U, before["first.U"])
    optimizer.param_groups[0]["lr"] = 0.1
    run(net, optimizer, data, 1)
    assert optimizer.param_groups[0]["phase"] == 1
    assert optimizer.ranks() == {"first": 6, "second": 6, "third": 4, "unused": 3}


def test_truncating_between_steps_ends_the_cycle():
    net = reserve(Net())
    data = torch.randn(16, 8), torch.randn(16, 4)
    optimizer = AugmentedHeavyBall(param_groups(net), lr=0.1, tolerance=0.01)
    run(net, optimizer, data, 3)
    assert optimizer.ranks()["first"] == 6
    optimizer.truncate()
    assert optimizer.ranks()["first"] == 3 and optimizer.param_groups[0]["phase"] == 0
    assert not net.first.S[3:].any() and not net.first.S[:, 3:].any()
    run(net, optimizer, data, 1)
    assert optimizer.ranks()["first"] == 6


def test_diagnostics_hold_the_rank_in_use():
    net = reserve(Net())
    net.unused.requires_grad_(False)
    optimizer = AugmentedAdam(param_groups(net))
    found = diagnostics.snapshot(net, optimizer)["ranks"]
    assert found == {"first": 3, "second": 3, "third": 2, "unused": 6}


def test_transports_tell_how_much_momentum_survived_the_truncation():
    net = reserve(Net())
    data = torch.randn(16, 8), torch.randn(16, 4)
    optimizer = AugmentedHeavyBall(param_groups(net), lr=0.1, inner_steps=2)
    run(net, optimizer, data, 3)
    found = optimizer.transports()
    assert set(found) == {"first", "second", "third"}
    assert all(0 < kept < 1 for kept in found.values())


def test_compiled_cycles_are_the_same_and_compile_once_for_each_event():
    torch._dynamo.reset()
    counters.clear()
    data = torch.randn(16, 8), torch.randn(16, 4)
    net = reserve(LowRankLinear(8, 4, 2))
    twin, graphs = copy.deepcopy(net), []
    ours, reference = (AugmentedAdam(param_groups(n), inner_steps=2, lr=0.01) for n in (net, twin))
    ours.compile(backend="eager")
    for _ in range(3):
        for optimizer in (ours, reference):
            optimizer.param_groups[0]["lr"] *= 0.9
        run(net, ours, data, 3)
        run(twin, reference, data, 3)
        graphs.append(counters["stats"]["unique_graphs"])
    # At most: three events, proposed and taken; none for another learning rate.
    assert graphs == [graphs[0]] * 3 and graphs[0] <= 6
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


BAD = {
    "no inner step": (dict(inner_steps=0), ValueError, "inner_steps needs to be >= 1, got 0"),
    "half a step": (dict(inner_steps=2.5), TypeError, "whole number, got 2.5"),
    "a tolerance of 1": (dict(tolerance=1.0), ValueError, r"tolerance needs .* \[0, 1\), got 1.0"),
    "no rank": (dict(min_rank=0), ValueError, "min_rank needs to be >= 1, got 0"),
    "crossed ranks": (dict(min_rank=4, max_rank=3), ValueError, "max_rank needs .* >= 4 .* got 3"),
}


@pytest.mark.parametrize("settings, error, sentence", BAD.values(), ids=BAD)
@pytest.mark.parametrize("cls", [AugmentedHeavyBall, AugmentedAdam])
def test_refuses(cls, settings, error, sentence):
    with pytest.raises(error, match=sentence):
        cls(param_groups(LowRankLinear(8, 8, 3)), **settings)


def test_refuses_what_only_one_of_them_has():
    groups = param_groups(LowRankLinear(8, 8, 3))
    with pytest.raises(ValueError, match=r"'square-root' or 'mixed', got 'exact'"):
        AugmentedAdam(groups, second="exact")
    with pytest.raises(ValueError, match=r"eps > 0, got 0"):
        AugmentedAdam(groups, eps=0.0)
    with pytest.raises(ValueError, match=r"beta in \[0, 1\), got 1\.0"):
        AugmentedHeavyBall(groups, momentum=1.0)


def test_refuses_averages_and_states_of_other_methods():
    groups = param_groups(LowRankLinear(8, 8, 3))
    with pytest.raises(TypeError, match="keeps the rank, got AugmentedHeavyBall"):
        ScheduleFree(AugmentedHeavyBall(groups, momentum=0.0))
    with pytest.raises(
        ValueError, match="momentum, too; load a state saved with the same optimizer"
    ):
        AugmentedHeavyBall(groups).load_state_dict(RiemannianSGD(groups).state_dict())


def test_unequal_layers_without_gradient_do_not_hold_up_the_cycle():
    """A layer used every other batch augments and truncates when it can; its weights stay of the kept rank or width."""
    net, x = reserve(Net()), torch.randn(16, 8)
    optimizer = AugmentedHeavyBall(param_groups(net), lr=0.05, inner_steps=3)
    for step in range(20):
        backward(net, (x, torch.ones(16, 4)))
        if step % 2:
            net.unused(x).square().mean().backward()
        optimizer.step()
        assert 2 <= optimizer.ranks()["unused"] <= 6
    assert all(torch.isfinite(p).all() for p in net.parameters())
