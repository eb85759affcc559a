"""Learning rate, β and ν for a problem, from its curvatures, its noise and the length of the run."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from lowrank_geo.analysis import linear, qhm
from lowrank_geo.analysis.checks import check_count, check_noise, check_positive, check_spectrum
from lowrank_geo.analysis.two_step import quasi_hyperbolic

METHODS = {  # the values of ν that each may take; None: ν = β
    "sgd": (0.0,),
    "heavy-ball": (1.0,),
    "nesterov": (None,),
    "qhm": (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
}
DECAYS = 1 - np.geomspace(1, 1e-3, 60)
STEPS = np.geomspace(1e-3, 0.98, 80)  # as shares of the stability bound


class Problem(NamedTuple):
    """A quadratic, and how long it is to be descended.

    Units: curvatures in loss per squared weight, noise a standard deviation of each coordinate of the gradient, start
    an excess loss.
    """

    curvature_min: float
    curvature_max: float
    noise: float = 0.0
    steps: int = 1000
    start: float = 1.0


class Advice(NamedTuple):
    """Settings, what to expect of them, and why."""

    optimizer: str
    lr: float  # as the optimizer's class takes it
    alpha: float  # lr times gain: comparable between methods
    beta: float
    nu: float
    rate: float
    floor: float  # stationary excess loss
    reasons: tuple[str, ...]

    def code(self) -> str:
        """The line that makes the optimizer."""
        if self.optimizer == "qhm":
            return f"RiemannianSGD(params, lr={self.lr:.4g}, filter=QHM(nu={self.nu:.4g}, beta={self.beta:.6g}))"
        nesterov = ", nesterov=True" if self.optimizer == "nesterov" else ""
        return f"RiemannianSGD(params, lr={self.lr:.4g}, momentum={self.beta:.6g}{nesterov})"


def advise(problem: Problem, optimizer: str = "qhm") -> Advice:
    """The settings with the least expected loss after the run: start·rate^(2·steps) + stationary loss.

    Found on a grid: 60 decays, 80 steps up to 98 % of the stability bound (a curvature is an estimate), 9 values of
    ν for "qhm".

    Shapes: numbers.
    Units: lr and α in weights per gradient, the floor a loss.
    Raises: ValueError for an unknown optimizer, curvatures that are not 0 < min <= max, negative noise or no steps.
    Source: Gitman et al., NeurIPS 2019, section 5 (the guidelines), with the exact stationary variance.

    >>> advise(Problem(0.1, 40.0, noise=0.0), "heavy-ball").beta > 0.8
    True
    """
    _check(problem, optimizer)
    spectrum = np.array([problem.curvature_min, problem.curvature_max])
    best, least = None, math.inf
    decays = [0.0] if optimizer == "sgd" else DECAYS.tolist()
    for beta, fixed in itertools.product(decays, METHODS[optimizer]):
        nu = beta if fixed is None else fixed
        rule = quasi_hyperbolic(beta, nu)
        alphas = STEPS * linear.largest_step(rule) / problem.curvature_max
        rates = linear.radius(rule, alphas[:, None], spectrum).max(-1)
        floors = linear.excess_loss(rule, alphas, spectrum.tolist(), problem.noise**2)
        losses = problem.start * rates ** (2 * problem.steps) + floors
        # Where all have converged to the last digit, the faster one.
        losses = losses + 1e-9 * problem.start * rates
        at = int(losses.argmin())
        if losses[at] < least:
            least, best = losses[at], (alphas[at], beta, nu, rates[at], floors[at])
    assert best is not None
    alpha, beta, nu, rate, floor = map(float, best)
    lr = alpha if optimizer in ("qhm", "sgd") else alpha * (1 - beta)
    reasons = tuple(_reasons(problem, alpha, beta, nu, rate, floor))
    return Advice(optimizer, lr, alpha, beta, nu, rate, floor, reasons)


def _reasons(
    problem: Problem, alpha: float, beta: float, nu: float, rate: float, floor: float
) -> list[str]:
    low, high = problem.curvature_min, problem.curvature_max
    edge = qhm.alpha_max(beta, nu, high)
    told = [
        f"Stability: lr·gain has to stay below {edge:.4g}, and is {alpha / edge:.0%} of it.",
        f"Speed: a step shrinks the error by {rate:.5f}, e-fold in {-1 / math.log(rate):.0f} steps; "
        f"the best without noise, at the edge of stability, is {qhm.optimal(low, high).rate:.5f} (heavy ball).",
    ]
    if nu == 1 and beta >= qhm.optimal(low, high).beta:
        first, last = qhm.plateau(beta, low, high)
        told.append(
            f"Plateau: every lr·gain from {first:.4g} to {last:.4g} is as fast at this beta; "
            "smaller ones are less noisy."
        )
    if problem.noise:
        double = qhm.stationary_loss(
            min(2 * alpha, 0.99 * edge), beta, nu, [low, high], problem.noise**2
        )
        told.append(
            f"Noise: the loss stays {floor:.4g} above its minimum; at twice the rate it would be {double:.4g}."
        )
        told.append(
            f"When lr is dropped tenfold at the end, raise beta to {qhm.optimal_beta(alpha / 10, low):.4f} "
            "to keep the best rate that such steps allow."
        )
    return told


def _check(problem: Problem, optimizer: str) -> None:
    if optimizer not in METHODS:
        raise ValueError(
            f"advise needs an optimizer out of {', '.join(METHODS)}, got {optimizer!r}; use one of them"
        )
    check_spectrum("advise", problem.curvature_min, problem.curvature_max)
    check_noise("advise", problem.noise)
    check_count("advise", "steps", problem.steps, 1)
    check_positive("advise", "start", problem.start)
