"""The reports of `lowrank-geo analyze qhm` and `advise`: rate, stability and noise around some settings."""

import math

import numpy as np

from lowrank_geo.analysis import figures, linear, qhm
from lowrank_geo.analysis.advice import Problem, advise
from lowrank_geo.analysis.checks import check_noise, check_spectrum
from lowrank_geo.analysis.pages import Report
from lowrank_geo.analysis.two_step import quasi_hyperbolic
from lowrank_geo.canvas import Figure


def qhm_report(
    alpha: float, beta: float, nu: float, problem: Problem, *, advised: tuple[str, ...] = ()
) -> Report:
    """Rate, stability and noise of QHM on a spectrum, and what other settings would do.

    Raises: ValueError for settings or curvatures out of range.
    """
    low, high, noise = problem.curvature_min, problem.curvature_max, problem.noise
    check_spectrum("analyze qhm", low, high)
    check_noise("analyze qhm", noise)
    rule, edge = quasi_hyperbolic(beta, nu), qhm.alpha_max(beta, nu, high)
    rate, best = qhm.rate(alpha, beta, nu, [low, high]), qhm.optimal(low, high, nu)
    floor = qhm.stationary_loss(alpha, beta, nu, [low, high], noise**2)
    numbers = [
        ("rate", f"{rate:.5f}", "error per step; above 1 it diverges"),
        ("stability bound", f"{edge:.4g}", f"α is {alpha / edge:.0%} of it"),
        ("stationary loss", f"{floor:.4g}", f"above the minimum, at noise {noise:g}"),
        ("best rate at this ν", f"{best.rate:.5f}", f"α = {best.alpha:.4g}, β = {best.beta:.4g}"),
    ]
    if nu == 1 and beta >= qhm.optimal(low, high).beta:
        first, last = qhm.plateau(beta, low, high)
        numbers.append(("plateau", f"{first:.4g} to {last:.4g}", "α of one and the same rate"))
    alphas = np.geomspace(1e-3, 1.02, 400) * edge
    rates = linear.radius(rule, alphas[:, None], np.array([low, high])).max(-1)
    marks = {"bound": edge, "here": alpha}
    drawn = [
        (
            "Rate over α",
            figures.curves(
                {"rate": (alphas, rates)},
                figures.ALPHA,
                "error per step (no unit)",
                edges=marks,
                logs="x",
                columns=3,
            ),
            "Flat where momentum sets the rate: there the smallest α is the best, as it is the least noisy.",
        ),
        (
            "Rate over α and β",
            _map(nu, low, high, (alpha, beta)),
            "The best rate is the darkest; white diverges, the line is the bound.",
        ),
    ]
    if noise:
        drawn.insert(
            1,
            (
                "Stationary loss over α",
                _floors(alphas[alphas < edge], beta, nu, problem, marks),
                "Exact, and the published expansion to second order, which is right only for α·λ far below 1 − β.",
            ),
        )
    told = (
        f"QHM with α = {alpha:g}, β = {beta:g}, ν = {nu:g} on curvatures from {low:g} to {high:g}"
    )
    ends = (
        "diverges" if rate >= 1 else f"shrinks the error e-fold in {-1 / math.log(rate):.0f} steps"
    )
    return Report(
        f"Quasi-hyperbolic momentum: α = {alpha:.4g}, β = {beta:.4g}, ν = {nu:.4g}",
        "diverges" if rate >= 1 else "stable",
        f"{told} {ends}.",
        numbers,
        drawn,
        advised,
        {"alpha": alpha, "beta": beta, "nu": nu, **problem._asdict()},
    )


def _map(nu: float, low: float, high: float, here: tuple[float, float]) -> Figure:
    betas = np.linspace(0, 0.99, 100)
    edges = np.array([qhm.alpha_max(b, nu, high) for b in betas])
    alphas = np.linspace(0, max(1.1 * here[0], min(1.1 * edges.max(), 5 * edges[50])), 161)[1:]
    rates = np.array(
        [
            linear.radius(quasi_hyperbolic(b, nu), alphas[:, None], np.array([low, high])).max(-1)
            for b in betas
        ]
    )
    labels = (figures.ALPHA, "decay β (no unit)", "error per step (no unit)")
    return figures.heat(
        alphas, betas, np.where(rates < 1, rates, np.nan), labels, edge=(edges, betas), here=here
    )


def _floors(
    alphas: np.ndarray, beta: float, nu: float, problem: Problem, marks: dict[str, float]
) -> Figure:
    spectrum = np.array([problem.curvature_min, problem.curvature_max])
    exact = linear.excess_loss(
        quasi_hyperbolic(beta, nu), alphas, spectrum.tolist(), problem.noise**2
    )
    bracket = qhm.expansion_bracket(beta, nu)
    rough = problem.noise**2 * (
        alphas[:, None] / 4 + alphas[:, None] ** 2 / 8 * bracket * spectrum
    ).sum(-1)
    lines = {"exact": (alphas, exact), "expansion": (alphas, np.where(rough > 0, rough, np.nan))}
    return figures.curves(
        lines, figures.ALPHA, "excess loss (loss)", edges=marks, logs="xy", columns=2
    )


def advice_report(problem: Problem, optimizer: str) -> Report:
    """Settings for a problem, with the reasons and the picture of QHM around them."""
    found = advise(problem, optimizer)
    report = qhm_report(found.alpha, found.beta, found.nu, problem, advised=found.reasons)
    return report._replace(
        title=f"Advice for {optimizer}",
        summary=found.code(),
        numbers=[
            ("lr", f"{found.lr:.4g}", "as the class takes it"),
            ("beta", f"{found.beta:.4g}", "decay of the momentum"),
            ("nu", f"{found.nu:.4g}", "weight of the momentum"),
            *report.numbers,
        ],
    )
