"""variance and Adam: the σ² recursion, its relatives against references, the posterior of the gradient."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lowrank_geo.geometry import Point, Tangent, gauge, project
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import RiemannianAdam, RiemannianSGD, param_groups
from lowrank_geo.optim.directions import Signal
from lowrank_geo.optim.variance import Variance


def drive(optimizer_of, grads):
    """A parameter under given gradients: the directions at lr 1, one a step."""
    p = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = optimizer_of([p])
    found = []
    for g in grads:
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        found.append(before - p.detach())
    return torch.stack(found), optimizer.state[p]


def noise(count, size=50, mean=0.0):
    return list(mean + torch.randn(count, size, dtype=torch.float64))


def test_second_moment_is_mean_square_plus_variance():
    """v = m² + σ² at every step, worst of 2000 x 50: 1.2e-15 relative."""
    v, beta = torch.zeros(50, dtype=torch.float64), 0.95
    p = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = RiemannianAdam([p], lr=1e-3)
    for g in noise(2000, mean=0.3):
        p.grad = g
        optimizer.step()
        v = beta * v + (1 - beta) * g.square()
        state = optimizer.state[p]
        second = state["momentum"].square() + state["variance"]
        assert ((v - second).abs() / v).max() < 1e-14


def test_variance_is_never_negative_where_the_difference_would_be():
    """Signal to noise of 1e4 in float32: v − m² is mostly rounding, σ² is not."""
    grads = list(1e4 + torch.randn(200, 500))
    _, state = drive(lambda p: RiemannianAdam(p, lr=1e-6), grads)
    assert (state["variance"] >= 0).all()


def test_direction_is_odd_free_of_scale_and_at_most_one():
    grads = noise(60)
    plain, _ = drive(lambda p: RiemannianAdam(p, lr=1.0, eps=0.0), grads)
    large, _ = drive(lambda p: RiemannianAdam(p, lr=1.0, eps=0.0), [1e3 * g for g in grads])
    negative, _ = drive(lambda p: RiemannianAdam(p, lr=1.0, eps=0.0), [-g for g in grads])
    assert (plain - large).abs().max() < 1e-12 and (plain + negative).abs().max() < 1e-12
    weight = 1 - 0.95 ** torch.arange(1, 61, dtype=torch.float64)
    # The corrected direction is m/√(m² + σ²) ≤ 1 over √(1 − βᵗ).
    assert (plain.abs() * weight.sqrt()[:, None]).max() <= 1 + 1e-12


@pytest.mark.parametrize("beta", [0.9, 0.95, 0.99])
def test_posterior_variance_estimates_white_noise_without_bias(beta):
    """σ² alone settles at 2β/(1 + β); means over 400 steps x 2000, standard error below 1 %."""
    p = nn.Parameter(torch.zeros(2000, dtype=torch.float64))
    optimizer = RiemannianAdam([p], lr=0.0, betas=(beta, beta))
    raw, estimates = [], []
    for t in range(1200):
        p.grad = 3 * torch.randn_like(p)
        optimizer.step()
        if t >= 800:
            raw.append(optimizer.state[p]["variance"].mean() / 9)
            estimates.append(optimizer.gradient_posterior(p).variance.mean() / 9)
    assert torch.stack(raw).mean().item() == pytest.approx(2 * beta / (1 + beta), rel=0.02)
    assert torch.stack(estimates).mean().item() == pytest.approx(1.0, rel=0.02)


def test_posterior_of_core_entries_is_that_of_white_noise_in_turning_frames():
    """1.06 of the variance at this rate, over which entries keep 0.975 of their weight: carried momentum adds to it."""
    layer = LowRankLinear(12, 12, 3, bias=False, dtype=torch.float64)
    optimizer = RiemannianAdam(param_groups(layer), lr=0.05, betas=(0.9, 0.9), over="core")
    estimates, kept = [], []
    for t in range(600):
        with torch.no_grad():
            layer.S.copy_(torch.eye(3))
        xi = gauge(layer.point, Tangent(*(3 * torch.randn_like(p) for p in layer.point)))
        layer.U.grad, layer.S.grad, layer.V.grad = xi
        optimizer.step()
        if t >= 100:
            estimates.append(optimizer.gradient_posterior(layer.S).variance.mean() / 9)
            kept.append(optimizer.state[layer.S]["kept"].mean())
    assert torch.stack(kept).mean() < 0.99
    assert torch.stack(estimates).mean().item() == pytest.approx(1.06, rel=0.06)


def test_the_recursion_minimises_the_variational_free_energy():
    """½ log s + (g − m)²/(2s) + KL(old‖new)/λ with β = 1/(1 + λ), against a grid around the closed form."""
    beta, old, s_old, g = 0.9, 0.4, 1.3, -0.8
    lam = 1 / beta - 1

    def energy(m, s):
        kl = 0.5 * ((s / s_old).log() + (s_old + (old - m) ** 2) / s - 1)
        return 0.5 * s.log() + (g - m) ** 2 / (2 * s) + kl / lam

    m = torch.tensor(beta * old + (1 - beta) * g)
    s = torch.tensor(beta * s_old + beta * (1 - beta) * (old - g) ** 2)
    dm, ds = torch.meshgrid(
        torch.linspace(-0.2, 0.2, 41), torch.linspace(-0.2, 0.2, 41), indexing="ij"
    )
    assert (energy(m, s) <= energy(m + dm, s * ds.exp()) + 1e-6).all()


class Reference(torch.optim.Optimizer):
    """QHAdam, Nadam without momentum decay and AdaVar, one formula each, written out."""

    def __init__(self, params, kind, lr=0.01):
        super().__init__(params, dict(lr=lr))
        self.kind, self.t = kind, 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        for p in self.param_groups[0]["params"]:
            p -= self.param_groups[0]["lr"] * self.direction(p, p.grad)

    def direction(self, p, g):
        state, t, eps = self.state[p], self.t, 1e-8
        m, v = (state.setdefault(k, torch.zeros_like(p)) for k in "mv")
        old = m.clone()
        b1, b2 = (0.9, 0.95) if self.kind == "adavar" else (0.9, 0.99)
        m.copy_(b1 * m + (1 - b1) * g)
        hat = m / (1 - b1**t)
        if self.kind == "adavar":  # γ = 0.5, τ = 0.95
            v.copy_(b2 * v + (1 - b2) * (old - g) ** 2)
            return hat / (((m**2 + 0.5 * v) / (1 - b2**t)).sqrt() + eps)
        v.copy_(b2 * v + (1 - b2) * g**2)
        second = v / (1 - b2**t)
        if self.kind == "nadam":
            return ((1 - b1) * g + b1 * hat) / (second.sqrt() + eps)
        return (0.3 * g + 0.7 * hat) / ((0.1 * g**2 + 0.9 * second).sqrt() + eps)


SETTINGS = {
    "nadam": dict(betas=(0.9, 0.99), nus=(0.9, 1.0)),
    "qhadam": dict(betas=(0.9, 0.99), nus=(0.7, 0.9)),
    "adavar": dict(betas=(0.9, 0.95), gamma=0.5),
}


def trajectory(net, make, count=1024):
    twin = copy.deepcopy(net)
    optimizer = make(twin.parameters())
    x = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for step in range(count):
        rows = slice(step % 4 * 8, step % 4 * 8 + 8)
        optimizer.zero_grad()
        (twin(x[rows]) - x[rows].sin().sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    return torch.stack(found)


@pytest.mark.parametrize("kind", SETTINGS)
def test_relatives_of_adam_are_their_formulas_over_1024_steps(kind):
    net = nn.Linear(6, 1).double()
    ours = trajectory(net, lambda p: RiemannianAdam(p, lr=0.01, **SETTINGS[kind]))
    assert (ours - trajectory(net, lambda p: Reference(p, kind))).abs().max() < 1e-7


@pytest.mark.parametrize("beta2", [0.99, 0.9])
def test_qhadam_of_ones_is_torch_adam_over_1024_steps(beta2):
    """(0.9, 0.9) is the tied form, which stores σ² where torch stores v."""
    net, betas = nn.Linear(6, 1).double(), (0.9, beta2)
    ours = trajectory(net, lambda p: RiemannianAdam(p, lr=0.01, betas=betas, nus=(1.0, 1.0)))
    theirs = trajectory(net, lambda p: torch.optim.Adam(p, lr=0.01, betas=betas))
    assert (ours - theirs).abs().max() < 1e-7


def test_tied_adam_is_torch_adamw_in_float32_over_200_steps():
    """Worst of 20 draws 2.4e-7."""
    settings = dict(lr=1e-3, betas=(0.95, 0.95), weight_decay=0.1)
    grads = list(torch.randn(200, 500))
    pairs = [nn.Parameter(torch.ones(500)) for _ in range(2)]
    ours, theirs = RiemannianAdam(pairs[:1], **settings), torch.optim.AdamW(pairs[1:], **settings)
    for g in grads:
        for p, optimizer in zip(pairs, (ours, theirs), strict=True):
            p.grad = g.clone()
            optimizer.step()
    assert (pairs[0] - pairs[1]).abs().max() < 1e-6


def test_rmsprop_divides_the_gradient_itself():
    grads = noise(20)
    found, _ = drive(lambda p: RiemannianAdam(p, lr=1.0, betas=(0.0, 0.9)), grads)
    v = torch.zeros(50, dtype=torch.float64)
    for t, g in enumerate(grads, start=1):
        v = 0.9 * v + 0.1 * g.square()
        assert (found[t - 1] - g / ((v / (1 - 0.9**t)).sqrt() + 1e-8)).abs().max() < 1e-12


def rotation(r):
    return torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0]


def test_core_moments_are_carried_as_those_of_uncorrelated_entries(point):
    """E[(Pᵀ g Q)²] for independent entries of variance v, over 200 000 draws to 2 %."""
    p, P, Q = point(7, 6, 2), rotation(2), rotation(2)
    turned = type(p)(p.U @ P, P.mT @ p.S @ Q, p.V @ Q)
    v = torch.rand(2, 2, dtype=torch.float64) + 0.1
    slots = {"variance": Tangent(torch.ones(7), v, torch.ones(6))}
    found = Variance(over="core").carry(slots, p, turned)["variance"].M
    g = torch.randn(200_000, 2, 2, dtype=torch.float64) * v.sqrt()
    assert ((P.mT @ g @ Q).square().mean(0) - found).abs().max() < 0.02
    assert found.sum() == pytest.approx(v.sum().item())


@pytest.mark.parametrize("steps", [5, 400])
def test_core_moments_are_without_bias_in_frames_that_turn_away(point, steps):
    """A constant g² is found again, though each turn takes some of the moments out of the frames."""
    rule, p = Variance(0.9, gamma=None, over="core"), point(7, 6, 2, batch=(1,))
    fresh = rule.slots(Point(*(x[0] for x in p)))
    slots = {name: Tangent(*(x[None] for x in state)) for name, state in fresh.items()}
    g = Tangent(*(torch.ones_like(x) for x in p))
    for step in range(1, steps + 1):
        direction, slots = rule(Signal(g, g, g, g, torch.full((1,), float(step))), slots)
        kept, tilted = slots["variance"].M, tilt(p)
        slots, p = rule.carry(slots, p, tilted), tilted
    assert (direction.M - 1).abs().max() < 1e-7  # eps is 1e-8
    assert kept.max() < 0.98 * (1 - 0.9**steps)  # what the count of steps would divide by


def tilt(p):
    """A point whose frames are some 20 degrees away."""
    U, V = (torch.linalg.qr(X + 0.1 * torch.randn(X.shape, dtype=X.dtype))[0] for X in (p.U, p.V))
    return Point(U, p.S, V)


@pytest.mark.parametrize("over, shapes", [("row", [(8,), (), (6,)]), ("matrix", [(), (), ()])])
def test_state_is_one_number_for_what_shares_it(over, shapes):
    layer = LowRankLinear(6, 8, 3)
    optimizer = RiemannianAdam(param_groups(layer), over=over)
    assert [tuple(optimizer.state[p]["variance"].shape) for p in layer.point] == shapes


def test_one_number_for_all_divides_by_the_norm_of_the_tangent(point):
    p = point(9, 7, 3)
    xi = project(p, torch.randn(9, 7, dtype=torch.float64))
    layer = LowRankLinear(7, 9, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        for parameter, value in zip(layer.point, p, strict=True):
            parameter.copy_(value)
    optimizer = RiemannianAdam(param_groups(layer), lr=1e-6, over="matrix")
    for parameter, part in zip(layer.point, xi, strict=True):
        parameter.grad = part.clone()
    before = layer.weight.detach()
    optimizer.step()
    size = sum(x.numel() for x in xi)
    moved = (before - layer.weight.detach()).norm() / 1e-6
    # |m̂| = |ξ|, and the corrected second moment of the first step is its mean square.
    assert moved.item() == pytest.approx(size**0.5, rel=1e-3)


@pytest.mark.parametrize("over", ["row", "matrix", "core"])
def test_a_bounded_direction_is_the_direction_shortened_a_triple_at_a_time(point, over):
    """Against the formula in float64, for two triples of which the first is too long and the second is not."""
    p, step = point(9, 7, 3, batch=(2,)), torch.full((2,), 3.0)
    fresh = Variance(over=over).slots(Point(*(x[0] for x in p)))
    slots = {name: Tangent(*(torch.stack([x, x]) for x in state)) for name, state in fresh.items()}
    g = Tangent(*(torch.randn_like(x) for x in p))
    m = Tangent(*(torch.stack([x[0], x[1] / 1e4]) for x in g))  # little of the gradient is left
    signal = Signal(m, g, Tangent(*(torch.zeros_like(x) for x in p)), m, step)
    free, kept = Variance(over=over)(signal, slots)
    found, same = Variance(over=over, max_rms=0.2)(signal, slots)
    rms = torch.cat([x.flatten(1) for x in free], 1).square().mean(1).sqrt()
    assert rms[0] > 0.3 and 0 < rms[1] < 0.01
    for short, long in zip(found, free, strict=True):
        assert (short[0] - 0.2 / rms[0] * long[0]).abs().max() < 1e-15
        assert torch.equal(short[1], long[1])
    assert all(torch.equal(same[n].Up, kept[n].Up) for n in kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bounded_step_moves_a_triple_and_a_tensor_by_at_most_the_bound(dtype):
    layer = LowRankLinear(40, 30, 4, dtype=dtype)
    optimizer = RiemannianAdam(param_groups(layer), lr=0.01, max_rms=0.2)
    before, bias = layer.weight.detach().double(), layer.bias.detach().double().clone()
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    moved = (before - layer.weight.detach().double()).norm()
    assert 0 < moved <= 0.01 * 0.2 * (4 * 74) ** 0.5 * 1.05  # retracted, rounded
    step = (bias - layer.bias.detach().double()).square().mean().sqrt().item()
    assert step == pytest.approx(0.01 * 0.2, rel=0.05)  # without the bound it is 0.01


def test_a_bound_that_does_not_bind_and_gradients_of_zero_change_nothing():
    def run(settings):
        torch.manual_seed(0)
        layer = LowRankLinear(6, 8, 3)
        optimizer = RiemannianAdam(param_groups(layer), **settings)
        for scale in (0.0, 1.0, 1.0):
            for p in layer.parameters():
                p.grad = scale * torch.randn_like(p)
            optimizer.step()
        return list(layer.parameters())

    pairs = zip(run({}), run({"max_rms": 1e3}), strict=True)
    assert all(torch.equal(plain, bounded) for plain, bounded in pairs)


@pytest.mark.parametrize("how", [pickle.dumps, RiemannianAdam.state_dict])
def test_a_state_of_before_there_were_bounds_goes_on_without(how):
    layer = LowRankLinear(6, 8, 3)
    old = RiemannianAdam(param_groups(layer), lr=0.3)
    for settings in (old.defaults, *old.param_groups):
        del settings["max_rms"]
    saved = how(old)
    if isinstance(saved, bytes):
        new = pickle.loads(saved)
    else:
        new = RiemannianAdam(param_groups(layer), max_rms=0.2)
        new.load_state_dict(saved)
    parameters = [p for group in new.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.ones_like(p)
    bias = next(p for p in parameters if p.dim() == 1)
    before = bias.detach().clone()
    new.step()
    assert (before - bias).mean().item() == pytest.approx(0.3, rel=1e-4)  # 0.06 with a bound


def test_a_number_is_a_parameter_too():
    grads = list(torch.randn(5, dtype=torch.float64))
    found, _ = drive(lambda p: RiemannianAdam(p, lr=1.0, betas=(0.9, 0.99)), grads)
    theirs, _ = drive(lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.9, 0.99)), grads)
    assert (found - theirs).abs().max() < 1e-7


def test_signal_to_noise_is_high_for_a_constant_gradient_and_low_for_noise():
    found = {}
    for name, gradient in (("constant", torch.ones), ("noise", torch.randn)):
        layer = LowRankLinear(6, 8, 3)
        optimizer = RiemannianAdam(param_groups(layer), lr=0.0)
        assert optimizer.signal_to_noise() == 0
        for _ in range(200):
            layer.bias.grad = gradient(8)
            xi = gauge(layer.point, Tangent(*(gradient(p.shape) for p in layer.point)))
            for p, part in zip(layer.point, xi, strict=True):
                p.grad = part.detach()
            optimizer.step()
        found[name] = optimizer.signal_to_noise().item()
    assert found["constant"] > 100 and found["noise"] < 0.1


def test_posterior_refuses_what_has_none():
    layer = LowRankLinear(4, 4, 2)
    tied = RiemannianAdam(param_groups(layer))
    with pytest.raises(ValueError, match=r"a parameter of this optimizer, got one of shape \(2,\)"):
        tied.gradient_posterior(nn.Parameter(torch.ones(2)))
    untied = RiemannianAdam(param_groups(layer), betas=(0.9, 0.99))
    with pytest.raises(ValueError, match=r"tied betas > 0 and no gamma, got \(0\.9, 0\.99\)"):
        untied.gradient_posterior(layer.S)
    assert not hasattr(RiemannianSGD(param_groups(layer)), "gradient_posterior")


BAD = {
    "an unknown over": (dict(over="column"), "'row', 'matrix' or 'core', got 'column'"),
    "a nu above 1": (dict(nus=(1.0, 1.5)), r"nus need .* got \(1\.0, 1\.5\)"),
    "a negative gamma": (dict(gamma=-1.0), r"gamma >= 0, got -1\.0"),
    "a bound of zero": (dict(max_rms=0.0), r"max_rms > 0, got 0\.0; pass e\.g\. 0\.2"),
    "a negative eps": (dict(eps=-1.0), r"eps >= 0, got -1\.0"),
}


@pytest.mark.parametrize("settings, sentence", BAD.values(), ids=BAD)
def test_refuses(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        RiemannianAdam(param_groups(LowRankLinear(4, 4, 2)), **settings)
