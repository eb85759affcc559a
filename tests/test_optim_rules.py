"""The parts an optimizer is made of, each against its formula written densely in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from lowrank_geo import geometry
from lowrank_geo.geometry import Tangent, embed, project, to_dense
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD, param_groups
from lowrank_geo.optim.directions import EmbeddedSpectral, ProductSpectral, Signal
from lowrank_geo.optim.filters import EMA, HeavyBall, Nesterov, NesterovEMA
from lowrank_geo.optim.metrics import PRODUCT, metric_named
from lowrank_geo.optim.schedules import constant, cosine, warmup_stable_decay
from lowrank_geo.optim.variance import Variance

STEP = torch.ones(1)


def batched(xi):
    return type(xi)(*(x[None] for x in xi))


def random_tangent(point):
    return project(point, torch.randn(*to_dense(point).shape, dtype=torch.float64))


def damped_msign(X, damping=1e-3):
    P, sigma, Qt = torch.linalg.svd(X, full_matrices=False)
    return (P * (sigma / (sigma**2 + (damping * sigma.norm()) ** 2).sqrt())) @ Qt


def paired(module, ours, theirs, steps, loss):
    """Train two copies with the two optimizers; the parameters of both."""
    twin = copy.deepcopy(module)
    pairs = ((module, ours(module)), (twin, theirs(twin)))
    for _ in range(steps):
        x = torch.randn(16, 6, dtype=torch.float64)
        for net, optimizer in pairs:
            optimizer.zero_grad()
            loss(net(x)).backward()
            optimizer.step()
    return zip(module.parameters(), twin.parameters(), strict=True)


SGD = {
    "plain": (dict(momentum=0.0), dict()),
    "heavy ball": (dict(momentum=0.9), dict(momentum=0.9)),
    "nesterov": (dict(momentum=0.9, nesterov=True), dict(momentum=0.9, nesterov=True)),
}


@pytest.mark.parametrize("ours, theirs", SGD.values(), ids=SGD)
def test_euclidean_sgd_is_that_of_torch(ours, theirs):
    pairs = paired(
        nn.Linear(6, 4).double(),
        lambda net: RiemannianSGD(net.parameters(), lr=0.02, **ours),
        lambda net: torch.optim.SGD(net.parameters(), lr=0.02, **theirs),
        100,
        lambda y: y.square().mean(),
    )
    assert all((a - b).abs().max() < 1e-12 for a, b in pairs)


@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.99)])
@pytest.mark.parametrize("optimizer", [RiemannianAdam, RiemannianMuon])
def test_euclidean_adam_is_that_of_torch_adamw(optimizer, betas):
    shared = dict(lr=0.01, betas=betas, weight_decay=0.1)
    extra = {"euclidean_lr": 0.01}  # groups without a geometry are euclidean
    pairs = paired(
        nn.Linear(6, 4).double(),
        lambda net: optimizer(net.parameters(), **shared, **extra),
        lambda net: torch.optim.AdamW(net.parameters(), **shared),
        200,
        lambda y: y.square().mean() + y.sin().mean(),
    )
    assert all((a - b).abs().max() < 1e-11 for a, b in pairs)


@pytest.mark.parametrize("ours, theirs", SGD.values(), ids=SGD)
@pytest.mark.parametrize("retraction", ["svd", "orthographic", "splitting"])
def test_at_full_rank_the_manifold_is_flat(retraction, ours, theirs):
    """At r = m = n every matrix is tangent, and Riemannian SGD is SGD on the dense weight."""
    layer = LowRankLinear(6, 6, 6, dtype=torch.float64)
    dense = nn.Linear(6, 6).double()
    dense.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    optimizers = (
        RiemannianSGD(param_groups(layer), lr=0.02, retraction=retraction, **ours),
        torch.optim.SGD(dense.parameters(), lr=0.02, **theirs),
    )
    for _ in range(20):
        x = torch.randn(16, 6, dtype=torch.float64)
        for net, optimizer in zip((layer, dense), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert (layer.weight - dense.weight).abs().max() < 1e-12


def test_muon_on_a_matrix_moves_along_its_polar_factor():
    linear = nn.Linear(6, 4, bias=False).double()
    group = {"params": [linear.weight], "geometry": "matrix", "lr": 0.01}
    before, G = linear.weight.detach().clone(), torch.randn(4, 6, dtype=torch.float64)
    linear.weight.grad = G
    RiemannianMuon([group], scale=0.2).step()
    expected = before - 0.01 * 0.2 * math.sqrt(6) * damped_msign(G)
    assert (linear.weight - expected).abs().max() < 2e-3 * 0.01 * 0.2 * math.sqrt(6)


def test_muon_reads_a_convolution_as_one_matrix():
    conv = nn.Conv2d(3, 5, 2, bias=False).double()
    groups = param_groups(conv, lr=0.01)
    assert groups[0]["geometry"] == "matrix"
    before = conv.weight.detach().clone()
    conv.weight.grad = torch.randn_like(conv.weight)
    RiemannianMuon(groups).step()
    moved = (before - conv.weight).flatten(1)
    sigma = torch.linalg.svdvals(moved.detach())
    assert sigma[0] == pytest.approx(0.01 * 0.2 * math.sqrt(12), rel=5e-3)


def test_product_gradient_is_the_horizontal_factor_gradient(point):
    p = point(9, 7, 3)
    G = torch.randn(9, 7, dtype=torch.float64)
    U, S, V = (x.clone().requires_grad_() for x in p)
    (G * (U @ S @ V.mT)).sum().backward()
    found = PRODUCT.gradient(p, project(p, G))
    identity_m, identity_n = torch.eye(9, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    expected = ((identity_m - p.U @ p.U.mT) @ U.grad, S.grad, (identity_n - p.V @ p.V.mT) @ V.grad)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-13


def test_embedded_spectral_is_the_projected_polar_factor(point):
    p = point(20, 15, 4)
    xi = random_tangent(p)
    direction, _ = EmbeddedSpectral(scale=1.0)(Signal(batched(xi), xi, xi, xi, STEP), {})
    ambient = embed(p, xi)
    P, _, Qt = torch.linalg.svd(ambient)
    expected = project(p, (P[:, :8] @ Qt[:8]) * math.sqrt(20))  # ξ has rank 2r = 8
    error = max((a[0] - b).abs().max() for a, b in zip(direction, expected, strict=True))
    assert error < 5e-3 * math.sqrt(20)  # the damping of msign


def test_product_spectral_moves_by_the_stated_units(point):
    p = point(40, 30, 5)
    xi = random_tangent(p)
    direction, _ = ProductSpectral(0.2, 0.144, 0.7)(Signal(batched(xi), xi, xi, xi, STEP), {})
    sizes = [torch.linalg.matrix_norm(x[0], 2).item() for x in direction]
    assert sizes == pytest.approx([0.144 * 40**0.5, 0.7, 0.144 * 30**0.5], rel=2e-3)


@pytest.mark.parametrize("direction", [EmbeddedSpectral(), ProductSpectral()])
def test_spectral_directions_of_zero_are_zero(direction):
    zero = Tangent(*(torch.zeros(1, *s) for s in ((5, 2), (2, 2), (4, 2))))
    found, _ = direction(Signal(zero, zero, zero, zero, STEP), {})
    assert all((x == 0).all() for x in found)


@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.99)])
def test_row_variance_is_adam_over_rows(point, betas):
    """m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε) with v the EMA of mean squares of each row, over twelve steps in a fixed frame."""
    beta1, beta2 = betas
    p, rule = point(6, 5, 2), Variance(beta2, gamma=beta2 if beta1 == beta2 else None)
    slots = {k: batched(v) for k, v in rule.slots(p).items()}
    momentum = batched(Tangent(*(torch.zeros_like(x) for x in p)))
    second = [torch.zeros(6, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for t in range(1, 13):
        g = random_tangent(p)
        mean = Tangent(
            *(beta1 * a + (1 - beta1) * b for a, b in zip(momentum, batched(g), strict=True))
        )
        unbiased = Tangent(*(x / (1 - beta1**t) for x in mean))
        signal = Signal(unbiased, batched(g), momentum, mean, STEP * t)
        found, slots = rule(signal, slots)
        second[0] = beta2 * second[0] + (1 - beta2) * g.Up.square().mean(1)
        second[1] = beta2 * second[1] + (1 - beta2) * g.M.square().mean()
        momentum = mean
        for part, v in ((0, second[0][:, None]), (1, second[1])):
            hat = mean[part][0] / (1 - beta1**t)
            expected = hat / ((v / (1 - beta2**t)).sqrt() + 1e-8)
            assert (found[part][0] - expected).abs().max() < 1e-12


def test_filters_are_those_of_torch():
    """u, v, a, b unrolled by hand: two steps from zero with gradients 1 and 2."""
    expected = {
        HeavyBall(0.9): [1.0, 2.9],
        Nesterov(0.9): [1.9, 2 + 0.9 * 2.9],
        EMA(0.9): [0.1, 0.9 * 0.1 + 0.2],
        NesterovEMA(0.9): [0.1 + 0.9 * 0.1, 0.2 + 0.9 * (0.09 + 0.2)],
    }
    for rule, outputs in expected.items():
        u, v, a, b = rule.coefficients(STEP)
        m, found = 0.0, []
        for g in (1.0, 2.0):
            m = u * m + v * g
            found.append(a * g + b * m)
        assert found == pytest.approx(outputs), rule


@pytest.mark.parametrize("metric", ["embedded", "product"])
def test_metrics_carry_momentum_into_the_new_tangent_space(point, metric):
    p = point(12, 9, 3)
    rule = metric_named(metric)
    xi = rule.gradient(p, random_tangent(p))
    to, moved = rule.move(p, Tangent(*(0.1 * x for x in xi)), xi)
    assert (to.U.mT @ moved.Up).abs().max() < 1e-13 and (to.V.mT @ moved.Vp).abs().max() < 1e-13
    assert geometry.norm(moved) <= geometry.norm(xi) * (1 + 1e-12)


def rates(schedule, steps):
    optimizer = schedule.optimizer
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.fixture
def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def test_warmup_stable_decay_rises_rests_and_falls(optimizer):
    found = rates(warmup_stable_decay(optimizer, 10, warmup=0.2, decay=0.3), 11)
    assert found == pytest.approx([0.5, *[1.0] * 7, 2 / 3, 1 / 3, 0.0])


def test_cosine_ends_at_its_floor(optimizer):
    found = rates(cosine(optimizer, 10, warmup=0.2, floor=0.1), 12)
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2
    assert found[:3] == pytest.approx([0.5, 1.0, 1.0]) and found[6] == pytest.approx(middle)
    assert found[-1] == pytest.approx(0.1) and min(found) == pytest.approx(0.1)


def test_constant_is_constant(optimizer):
    assert rates(constant(optimizer), 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda o: warmup_stable_decay(o, 10, warmup=0.6, decay=0.6), "sum <= 1, got 0.6 and 0.6"),
        (lambda o: warmup_stable_decay(o, 0), "total_steps >= 1, got 0"),
        (lambda o: cosine(o, 10, warmup=-0.1), r"in \[0, 1\], got -0.1"),
        (lambda o: cosine(o, -3), "total_steps >= 1, got -3"),
        (lambda o: cosine(o, "10"), "total_steps needs to be a whole number, got '10'"),
        (lambda o: warmup_stable_decay(o, math.nan), "total_steps needs .* whole number, got nan"),
        (lambda o: warmup_stable_decay(o, 10, warmup=math.nan), "sum <= 1, got nan and 0.5"),
        (lambda o: warmup_stable_decay(o, 10, decay="x"), "decay needs to be a number, got 'x'"),
        (lambda o: cosine(o, 10, floor=None), "floor needs to be a number, got None"),
        (lambda o: cosine(0.1, 10), "cosine needs an optimizer, got 0.1; pass the optimizer first"),
        (lambda o: constant(None), "constant needs an optimizer, got None"),
    ],
)
def test_schedules_refuse(make, sentence, optimizer):
    with pytest.raises((ValueError, TypeError), match=sentence):
        make(optimizer)


def test_groups_name_their_geometry():
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "low": LowRankLinear(4, 4, 2),
            "frozen": LowRankLinear(4, 4, 2).requires_grad_(False),
            "dense": nn.Linear(4, 4),
            "lm_head": nn.Linear(4, 7, bias=False),
        }
    )
    groups = param_groups(net, lr=0.1, euclidean_lr=0.2, weight_decay=0.3)
    found = [(g["geometry"], len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]
    assert found == [
        ("fixed_rank", 3, 0.1, 0.3),
        ("matrix", 1, 0.1, 0.3),
        ("euclidean", 2, 0.2, 0.3),  # embedding and head
        ("euclidean", 2, 0.2, 0.0),  # biases
    ]
    assert groups[0]["layers"] == ["low"]
    assert (net["low"].gradient, net["frozen"].gradient) == ("tangent", "factors")


def test_matrices_left_dense_follow_the_rate_of_the_matrices():
    """At the rate of the embeddings they hardly move: a dense matrix wants about the rate that factors want."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1] = LowRankLinear(4, 4, 2, bias=False)
    for lr in (None, 0.03):
        optimizer = RiemannianMuon(param_groups(net, lr=lr), euclidean_lr=0.5)
        assert {g["geometry"]: g["lr"] for g in optimizer.param_groups} == {
            "fixed_rank": lr or 0.01,
            "matrix": lr or 0.01,
        }


def test_groups_refuse_a_half_frozen_triple():
    layer = LowRankLinear(4, 4, 2)
    layer.V.requires_grad_(False)
    with pytest.raises(ValueError, match="all trained or all frozen, got V frozen"):
        param_groups(layer)
    assert layer.gradient == "factors"
