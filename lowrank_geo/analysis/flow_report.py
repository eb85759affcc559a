"""The report of `lowrank-geo analyze flow`: heavy ball, its flow and how long one follows the other."""

import math

import numpy as np
import torch
from torch import nn

from lowrank_geo.analysis import figures
from lowrank_geo.analysis.checks import check_count, check_curvatures, check_positive
from lowrank_geo.analysis.coefficients import check_order, counter_terms, flow_coefficients
from lowrank_geo.analysis.flow import flow_validity_bound, heavy_ball_flow
from lowrank_geo.analysis.pages import Report
from lowrank_geo.analysis.quadratic import quadratic_flow
from lowrank_geo.analysis.two_step import heavy_ball
from lowrank_geo.canvas import STEP
from lowrank_geo.optim import RiemannianSGD

MOST = 4  # terms: each costs eight times the one before, in nested derivatives


def rates_by_order(mu: float, s: np.ndarray, order: int) -> np.ndarray:
    """Relative error of the decay rate of the settled flow with 1 … order terms, at ηλ = s.

    Shapes: s (k) -> (order, k).

    >>> rates_by_order(0.9, np.array([0.002]), 4).round(3).ravel().tolist()
    [0.255, 0.113, 0.06, 0.034]
    """
    exact = np.log((1 + mu - s + np.sqrt((1 + mu - s) ** 2 - 4 * mu)) / 2)
    coefficients = flow_coefficients(mu, None, order)
    tree: tuple = ()
    total, found = np.zeros_like(s), []
    for n in range(1, order + 1):
        # On a quadratic only the chains count: (−λ)ⁿ each.
        total = total + coefficients[tree] * (-s) ** n
        found.append(abs(total / exact - 1))
        tree = (tree,)
    return np.array(found)


def flow_report(mu: float, eta: float, curvature: float, order: int, steps: int) -> Report:
    """Heavy ball against its flow: bound, coefficients, and the real optimizer beside the flows of each order.

    Raises: ValueError for μ, η, order, steps or a curvature out of range, or ηλ beyond the validity bound.
    """
    heavy_ball("analyze flow", mu)
    check_positive("analyze flow", "eta", eta)
    check_curvatures("analyze flow", [curvature])
    check_count("analyze flow", "steps", steps, 2)
    check_order("analyze flow", order, MOST)
    hessian = torch.diag(torch.tensor([curvature, curvature / 10], dtype=torch.float64))
    start = torch.tensor([1.0, math.sqrt(10)], dtype=torch.float64)
    exact = quadratic_flow(hessian, start, mu, eta, steps)
    times = eta * torch.arange(steps + 1, dtype=torch.float64)

    found = iterates(hessian, start, eta, mu, steps)
    distances = {}
    for n in range(1, order + 1):
        flow = heavy_ball_flow(lambda x: hessian @ x, mu, eta, n).trajectory(start, steps)
        away = (flow - found).norm(dim=1) / start.norm()
        distances[_terms(n)] = (range(1, steps + 1), away[1:].numpy())
    gap = float((exact.at(times) - found).abs().max())
    bound, s = flow_validity_bound(mu), eta * curvature
    terms = counter_terms(mu, None)
    numbers = [
        ("validity bound on η·λ", f"{bound:.4g}", "(1 − √μ)², no unit"),
        ("η·λ", f"{s:.4g}", f"{s / bound:.0%} of the bound"),
        ("effective step", f"{eta * terms.c:.4g}", "η/(1 − μ), weight per gradient"),
        ("weight of |∇L|²", f"{eta * terms.gamma / (2 * terms.c):.4g}", "in the loss descended"),
        ("exact flow", f"{gap:.1e}", "largest distance from the iterates"),
    ]
    at = np.geomspace(1e-3, 0.999, 200) * bound
    errors = {
        _terms(n): (at, e.clip(1e-12)) for n, e in enumerate(rates_by_order(mu, at, order), 1)
    }
    transient = [counter_terms(mu, k) for k in range(min(steps, math.ceil(6 / (1 - mu))) + 1)]
    names = dict(zip("cγpq", zip(*transient, strict=True), strict=True))
    settle = {
        n: (range(len(transient)), np.array(v) / limit)
        for (n, v), limit in zip(names.items(), terms, strict=True)
    }
    return Report(
        f"Heavy ball as a flow: μ = {mu:g}, η = {eta:g}",
        "inside the bound",
        f"Heavy ball follows a first-order flow while η·λ < {bound:.4g}; here it is {s:.4g}.",
        numbers,
        [
            (
                "Distance of the flows from the optimizer",
                figures.curves(
                    distances,
                    STEP,
                    "|flow − optimizer| over |start| (no unit)",
                    logs="y",
                    half=False,
                ),
                f"RiemannianSGD on a quadratic with curvatures {curvature:g} and {curvature / 10:g}, beside the "
                "flows of each order.",
            ),
            (
                "Error of the decay rate",
                figures.curves(
                    errors,
                    "η·λ (no unit)",
                    "relative error (no unit)",
                    edges={"bound": bound, "here": s},
                    logs="xy",
                    columns=3,
                ),
                "Near the bound no number of terms helps: the iterates begin to oscillate there.",
            ),
            (
                "How the coefficients settle",
                figures.curves(settle, STEP, "share of the limit (no unit)"),
                "Coefficients of −g, −ηHg, −η²H²g and −η²T[g, g]. Using the limits from the start costs all orders but "
                "one.",
            ),
        ],
        settings={"mu": mu, "eta": eta, "curvature": curvature, "order": order, "steps": steps},
    )


def _terms(n: int) -> str:
    return f"{n} term{'s' * (n > 1)}"


def iterates(
    hessian: torch.Tensor, start: torch.Tensor, eta: float, mu: float, steps: int
) -> torch.Tensor:
    """The real optimizer on xᵀHx/2.

    Shapes: (d, d), (d) -> (steps + 1, d).
    """
    x = nn.Parameter(start.clone())
    optimizer, points = RiemannianSGD([x], lr=eta, momentum=mu), [start]
    for _ in range(steps):
        x.grad = hessian @ x.detach()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)
