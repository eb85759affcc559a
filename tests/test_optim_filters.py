"""filters: the schedule of FSGDM, frequency responses of the real optimizer state, equivalences with torch.optim."""

import cmath
import copy
import math

import pytest
import torch
from torch import nn

from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import RiemannianLion, RiemannianSGD, RiemannianSignum, param_groups
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


def test_kept_norms_keep_the_gain_of_the_filter():
    """Projection shortens the momentum; with keep_norm every step carries all of it."""
    layer = LowRankLinear(12, 10, 2, bias=False)
    losses = {}
    for keep in (False, True):
        twin = copy.deepcopy(layer)
        optimizer = RiemannianSGD(param_groups(twin), lr=0.3, keep_norm=keep)
        torch.manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            (twin(torch.randn(8, 12)) * torch.randn(8, 10)).sum().backward()
            optimizer.step()
        norms = [optimizer.state[p]["momentum"].square().sum() for p in twin.point]
        losses[keep] = float(torch.stack(norms).sum().sqrt())
        assert min(optimizer.transports().values()) < 1
    assert losses[True] > losses[False]


def train(module, make, count=1024):
    """1024 steps of a linear regression in float64; the trained parameters."""
    twin = copy.deepcopy(module)
    optimizer = make(twin.parameters())
    x = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = x.sin().sum(1, keepdim=True)
    for step in range(count):
        rows = slice(step % 4 * 8, step % 4 * 8 + 8)
        optimizer.zero_grad()
        (twin(x[rows]) - target[rows]).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in twin.parameters()])


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
