"""filters: the schedule of FSGDM, frequency responses of the real optimizer state, equivalences with torch.optim."""

import cmath
import copy
import math

import pytest
import torch
from torch import nn

from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import (
    RiemannianAdam,
    RiemannianLion,
    RiemannianSGD,
    RiemannianSignum,
    param_groups,
)
from lowrank_geo.optim.filters import EMA, FSGDM, QHM, HeavyBall, Nesterov, NesterovEMA


def steps(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("length", [1000, 117000])
def test_the_pole_of_fsgdm_depends_on_the_share_of_the_run_alone(length):
    shares = steps(0.1, 0.25, 0.5, 1.0) * length
    expected = [0.752, 0.883, 0.938, 0.968]
    assert FSGDM(length, stages=200).pole(shares).tolist() == pytest.approx(expected, abs=1e-3)


def test_fsgdm_is_constant_on_a_stage_and_after_the_run():
    rule = FSGDM(100, stages=10)
    poles = rule.pole(torch.arange(1.0, 131.0))
    assert (poles[:9] == 0).all() and (poles[9:19] == poles[9]).all() and poles[19] > poles[9]
    assert (poles[99:] == poles[99]).all()
    assert poles[99] == pytest.approx(1 / (1 + 0.033))


def test_more_stages_than_steps_are_one_step_each():
    assert FSGDM(3, stages=300).pole(steps(1, 2, 3)).unique().numel() == 3


def test_a_huge_c_is_no_momentum():
    u, v, a, b = FSGDM(100, c=1e12).coefficients(steps(100))
    assert u.item() < 1e-10 and (v, a, b) == (1.0, 0.0, 1.0)


FILTERS = [
    HeavyBall(0.9),
    Nesterov(0.8),
    EMA(0.9),
    NesterovEMA(0.95),
    QHM(0.7, 0.95),
    FSGDM(100, stages=1),
    FSGDM(4, c=1 / 9, stages=4),
]


def response(filter, omega, steps_=600, tau=1.0):
    """Output over gradient of the real optimizer for g = e^{jωn}: real and imaginary part are two parameters.

    `tau` contracts the momentum after each step, as a transport does.
    """
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = RiemannianSGD([p], lr=1.0, filter=filter)
    for n in range(steps_):
        drive = cmath.exp(1j * omega * n)
        p.grad = torch.tensor([drive.real, drive.imag], dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
        optimizer.state[p]["momentum"].mul_(tau)
    output = before - p.detach()
    return complex(*output.tolist()) / drive


@pytest.mark.parametrize("filter", FILTERS, ids=str)
@pytest.mark.parametrize("omega", [0.0, 0.1, 1.0, math.pi])
@pytest.mark.parametrize("tau", [1.0, 0.95])
def test_the_state_driven_by_a_wave_answers_with_the_transfer_function(filter, omega, tau):
    u, v, a, b = (float(x) for x in filter.coefficients(steps(600)))
    expected = a + b * v / (1 - u * tau * cmath.exp(-1j * omega))
    assert abs(response(filter, omega, tau=tau) - expected) < 1e-4 * abs(expected)


@pytest.mark.parametrize("omega", [0.0, 0.3, math.pi])
@pytest.mark.parametrize("filter", [HeavyBall(0.9), FSGDM(100), EMA(0.9)], ids=str)
def test_the_state_of_a_low_rank_layer_answers_a_wave_like_any_other(filter, omega):
    """Real and imaginary part drive two layers of a batch, which rest at lr = 0, so that transport is the identity."""
    layers = nn.ModuleList(LowRankLinear(5, 4, 2, bias=False).double() for _ in range(2))
    optimizer = RiemannianSGD(param_groups(layers, lr=0.0), filter=filter)
    xi = [torch.randn(p.shape, dtype=torch.float64) for p in layers[0].point]
    for n in range(600):
        drive = cmath.exp(1j * omega * n)
        for layer, part in zip(layers, (drive.real, drive.imag), strict=True):
            for p, tangent in zip(layer.point, gauged(layer, xi), strict=True):
                p.grad = part * tangent
        optimizer.step()
    u, v, *_ = (float(x) for x in filter.coefficients(steps(600)))
    answer = v / (1 - u * cmath.exp(-1j * omega)) * drive
    for layer, part in zip(layers, (answer.real, answer.imag), strict=True):
        for p, tangent in zip(layer.point, gauged(layer, xi), strict=True):
            error = (optimizer.state[p]["momentum"] - part * tangent).abs().max()
            assert error < 1e-4 * abs(answer) * tangent.abs().max()


def gauged(layer, xi):
    """Tangent coordinates from any three matrices."""
    U, _, V = (p.detach() for p in layer.point)
    up, core, vp = xi
    return up - U @ (U.mT @ up), core, vp - V @ (V.mT @ vp)


@pytest.mark.parametrize("keep", [False, True])
def test_kept_norms_keep_the_gain_of_the_filter(keep):
    """Projection shortens u m + g; with keep_norm the next step finds all of it."""
    layer = LowRankLinear(12, 10, 2, bias=False, dtype=torch.float64)
    optimizer = RiemannianSGD(param_groups(layer), lr=0.3, momentum=0.9, keep_norm=keep)
    for _ in range(5):
        optimizer.zero_grad()
        x, y = (torch.randn(8, size, dtype=torch.float64) for size in (12, 10))
        (layer(x) * y).sum().backward()
        m = [optimizer.state[p]["momentum"] for p in layer.point]
        filtered = [0.9 * a + p.grad for a, p in zip(m, layer.point, strict=True)]
        optimizer.step()
        before = torch.cat([part.flatten() for part in filtered]).norm()
        after = torch.cat([optimizer.state[p]["momentum"].flatten() for p in layer.point]).norm()
        (tau,) = optimizer.transports().values()
        assert tau < 0.999
        assert (after / before).item() == pytest.approx(1.0 if keep else tau, rel=1e-6)


def train(module, make, count=1024):
    """1024 steps of a linear regression in float64; the parameters after each."""
    twin = copy.deepcopy(module)
    optimizer = make(twin.parameters())
    x = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target, found = x.sin().sum(1, keepdim=True), []
    for step in range(count):
        rows = slice(step % 4 * 8, step % 4 * 8 + 8)
        optimizer.zero_grad()
        (twin(x[rows]) - target[rows]).square().mean().backward()
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    return torch.stack(found)


SAME = {
    "QHM(0, β) is SGD": (
        lambda p: RiemannianSGD(p, lr=0.02, filter=QHM(0.0, 0.9)),
        lambda p: torch.optim.SGD(p, lr=0.02),
    ),
    "QHM(1, β) is heavy ball with lr·(1 − β)": (
        lambda p: RiemannianSGD(p, lr=0.2, filter=QHM(1.0, 0.9)),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    ),
    "QHM(β, β) is Nesterov with lr·(1 − β)": (
        lambda p: RiemannianSGD(p, lr=0.2, filter=QHM(0.9, 0.9)),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    ),
    "NesterovEMA is QHM(β, β)": (
        lambda p: RiemannianSGD(p, lr=0.2, filter=NesterovEMA(0.9)),
        lambda p: RiemannianSGD(p, lr=0.2, filter=QHM(0.9, 0.9)),
    ),
    "FSGDM with one pole is heavy ball": (
        lambda p: RiemannianSGD(p, lr=0.02, filter=FSGDM(1, c=1 / 9)),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    ),
    "heavy ball": (
        lambda p: RiemannianSGD(p, lr=0.02, filter=HeavyBall(0.9)),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    ),
    "an average is heavy ball with dampening": (
        lambda p: RiemannianSGD(p, lr=0.2, filter=EMA(0.9)),
        lambda p: Damped(p, lr=0.2, momentum=0.9, dampening=0.9),
    ),
    "coordinates clipped after the average": (
        lambda p: clipping(RiemannianSGD(p, lr=0.2, filter=EMA(0.9), clip=0.05)),
        lambda p: clipping(ClippedSGD(p, lr=0.2)),
    ),
    "AdamW": (
        lambda p: RiemannianAdam(p, lr=0.01, betas=(0.95, 0.95), weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.95, 0.95), weight_decay=0.1),
    ),
    "RMSprop from zero, corrected for it, is Adam without a first moment": (
        lambda p: RiemannianAdam(p, lr=0.01, betas=(0.0, 0.95)),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.95)),
    ),
    "Signum is the sign of the average": (
        lambda p: RiemannianSignum(p, lr=1e-3, momentum=0.9),
        lambda p: Lion(p, lr=1e-3, betas=(0.9, 0.9)),
    ),
    "Signum without momentum is the sign of the gradient": (
        lambda p: RiemannianSignum(p, lr=1e-3, momentum=0.0),
        lambda p: SignSGD(p, lr=1e-3),
    ),
    "Lion": (
        lambda p: RiemannianLion(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
        lambda p: Lion(p, lr=1e-3, weight_decay=0.1),
    ),
}


class SignSGD(torch.optim.SGD):
    """p ← p − lr·sign(g)."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.grad.sign_()
        super().step()


class Damped(torch.optim.SGD):
    """The buffer of torch starts with the whole first gradient; this one starts from zero, as all later ones count."""

    def __init__(self, params, lr, momentum, dampening):
        super().__init__(params, lr=lr, momentum=momentum, dampening=dampening)
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)


class ClippedSGD(torch.optim.Optimizer):
    """p ← p − lr·clip(m, ±0.05) with m ← 0.9 m + 0.1 g."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            m.mul_(0.9).add_(0.1 * p.grad)
            p -= self.param_groups[0]["lr"] * m.clamp(-0.05, 0.05)


def clipping(optimizer):
    """Gradients clipped to a norm of 1 before each step."""
    take = optimizer.step

    def step():
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        take()

    optimizer.step = step
    return optimizer


class Lion(torch.optim.Optimizer):
    """As algorithm 2 of the paper: the step reads the old m with β₁, then m moves with β₂."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        (beta1, beta2), lr = group["betas"], group["lr"]
        for p in group["params"]:
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            c = beta1 * m + (1 - beta1) * p.grad
            p -= lr * (c.sign() + group["weight_decay"] * p)
            m.copy_(beta2 * m + (1 - beta2) * p.grad)


@pytest.mark.parametrize("ours, theirs", SAME.values(), ids=SAME)
def test_equals_the_reference_over_1024_steps(ours, theirs):
    net = nn.Linear(6, 1).double()
    assert (train(net, ours) - train(net, theirs)).abs().max() < 1e-7


BAD = {
    "a QHM beta of 1": (lambda: QHM(0.7, 1.0), r"QHM needs beta in \[0, 1\), got 1\.0"),
    "a negative nu": (lambda: QHM(-0.1, 0.9), r"nu >= 0, got -0\.1"),
    "no steps": (lambda: FSGDM(0), "total_steps >= 1, got 0; pass the length"),
    "no stages": (lambda: FSGDM(10, stages=0), "stages >= 1, got 0; pass e.g. 300"),
    "steps of None": (lambda: FSGDM(None), "needs total_steps, got None; pass the length"),
    "steps in quotes": (lambda: FSGDM("9"), "total_steps needs to be a whole number, got '9'"),
    "an infinite nu": (lambda: QHM(math.inf), "finite nu >= 0, got inf"),
    "half a stage": (lambda: FSGDM(10, stages=2.5), "stages needs to be a whole number, got 2.5"),
    "a nu in quotes": (lambda: QHM("0.7", 0.9), "nu needs to be a number, got '0.7'"),
    "a c of zero": (lambda: FSGDM(10, c=0.0), r"c > 0, got 0\.0"),
    "a negative v": (lambda: FSGDM(10, v=-1.0), r"v > 0, got -1\.0"),
    "a negative beta": (lambda: EMA(-0.1), r"EMA needs beta in \[0, 1\), got -0\.1"),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD)
def test_refuses(make, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        make()


def test_fsgdm_needs_the_length_of_the_run():
    with pytest.raises(TypeError, match="needs total_steps, got None; pass the length of the run"):
        FSGDM()


def test_an_unknown_keyword_is_refused_and_a_filter_has_to_be_one():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="v_coefficient"):
        FSGDM(10, v_coefficient=2.0)
    with pytest.raises(TypeError, match="filter needs a rule of lowrank_geo.optim.filters"):
        RiemannianSGD([p], filter="qhm")
