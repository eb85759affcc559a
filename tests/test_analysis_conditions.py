"""conditions: the real QHM inside and outside the conditions of the two theorems, on a noisy quadratic."""

import pytest
import torch
from torch import nn

from lowrank_geo.analysis.conditions import PowerSchedule, first_theorem, second_theorem
from lowrank_geo.analysis.two_step import at_step
from lowrank_geo.optim import RiemannianSGD
from lowrank_geo.optim.filters import QHM

INSIDE = {
    "momentum that dies": (PowerSchedule(0.5, w=0.75, beta=0.9, d=0.5, nu=0.7), first_theorem),
    "momentum that grows": (PowerSchedule(0.5, w=0.9, beta=0.5, c=0.6), second_theorem),
    "and nu with it": (PowerSchedule(0.5, w=0.9, beta=0.5, c=0.6, nu=0.3, e=0.5), second_theorem),
}


def losses(schedule, steps=4000, chains=2000):
    """The mean of x²/2 at a tenth of the run and at its end, with the real optimizer under unit noise."""
    x = nn.Parameter(torch.ones(chains, dtype=torch.float64))
    optimizer, found = RiemannianSGD([x], filter=schedule), []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        x.grad = x.detach() + torch.randn_like(x)
        optimizer.step()
        if step in (steps // 10, steps):
            found.append(float(x.detach().square().mean() / 2))
    return found


@pytest.mark.parametrize("schedule, theorem", INSIDE.values(), ids=INSIDE)
def test_inside_the_conditions_the_noise_dies_out(schedule, theorem):
    assert theorem(schedule) == []
    early, late = losses(schedule)
    assert late < early / 2.5


def test_outside_the_conditions_a_floor_stays():
    schedule = PowerSchedule(0.1, beta=0.9, nu=0.7)
    assert len(first_theorem(schedule)) == 2 and len(second_theorem(schedule)) == 3
    early, late = losses(schedule)
    assert late == pytest.approx(early, rel=0.2)
    assert late == pytest.approx(0.04369 / 2, rel=0.1)


def test_without_exponents_it_is_the_constant_filter():
    assert at_step(PowerSchedule(beta=0.9, nu=0.7), 5) == pytest.approx(at_step(QHM(0.7, 0.9), 5))


def test_the_schedules_are_powers():
    u, v, a, b = at_step(PowerSchedule(beta=0.5, c=0.5, nu=0.2, e=1.0), 4)
    assert (u, v) == pytest.approx((0.75, 0.25)) and (a, b) == pytest.approx((0.2, 0.8))
    assert at_step(PowerSchedule(beta=0.8, d=0.5), 4).u == pytest.approx(0.4)
    assert PowerSchedule(0.2, w=0.5).rate(4) == pytest.approx(0.1)


@pytest.mark.parametrize("w", [0.3, 0.5, 0.8, 1.0, 1.2])
@pytest.mark.parametrize("c", [0.2, 0.5, 0.7])
def test_the_second_theorem_for_powers(w, c):
    expected = 0.5 < c < 1 and (1 + c) / 2 < w <= 1
    assert (second_theorem(PowerSchedule(w=w, c=c)) == []) is expected


BAD = {
    "beta": ({"beta": 1.0}, r"beta in \[0, 1\), got 1\.0"),
    "nu": ({"nu": 1.5}, r"nu in \[0, 1\], got 1\.5"),
    "alpha": ({"alpha": 0.0}, r"alpha > 0, got 0\.0"),
    "an exponent": ({"w": -1.0}, r"w >= 0, got -1\.0"),
    "both ways": ({"c": 0.5, "d": 0.5}, "c or d to be 0, got 0.5 and 0.5"),
}


@pytest.mark.parametrize("settings, sentence", BAD.values(), ids=BAD)
def test_refuses(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        PowerSchedule(**settings)
