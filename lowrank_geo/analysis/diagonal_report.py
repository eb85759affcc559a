"""The report of `lowrank-geo analyze diagonal`: which solution momentum picks in a diagonal linear network."""

import torch
from torch import Tensor, nn

from lowrank_geo.analysis import figures
from lowrank_geo.analysis.checks import check_positive
from lowrank_geo.analysis.diagonal import implicit_bias, momentum_bias, shrinkage
from lowrank_geo.analysis.pages import Report
from lowrank_geo.analysis.two_step import heavy_ball
from lowrank_geo.optim import RiemannianSGD

EQUATIONS, UNKNOWNS = 20, 50
RESIDUAL, MOST = 1e-7, 200_000  # of Xθ = y, at which a run ends; steps
STEP_SIZE = "η/(1 − μ)² (weight per gradient)"


def sparse_problem(seed: int) -> tuple[Tensor, Tensor]:
    """20 random equations for 50 unknowns, of which 3 are not 0.

    Shapes: -> X (20, 50), y (20).
    """
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(EQUATIONS, UNKNOWNS, generator=generator, dtype=torch.float64)
    truth = torch.zeros(UNKNOWNS, dtype=torch.float64)
    truth[:3] = torch.tensor([1.0, -0.7, 0.5], dtype=torch.float64)
    return X, X @ truth


def train_diagonal(
    X: Tensor, y: Tensor, start: float, lr: float, mu: float
) -> tuple[Tensor, Tensor, Tensor]:
    """θ = u∘u − v∘v, Σ lr (∂L/∂θ)² and u∘v at the end of the real optimizer's run from u = v = start.

    Shapes: X (n, d), y (n) -> (d), (d), (d).
    Raises: ValueError if it has not converged within 200 000 steps.
    """
    both = nn.Parameter(torch.full((2, X.shape[1]), start, dtype=torch.float64))
    optimizer = RiemannianSGD([both], lr=lr, momentum=mu)
    signs = torch.tensor([[2.0], [-2.0]], dtype=torch.float64)
    squares = torch.zeros(X.shape[1], dtype=torch.float64)
    for step in range(MOST):
        u, v = both.detach()
        gap = X @ (u * u - v * v) - y
        if step % 100 == 0 and (gap.norm() < RESIDUAL or not gap.isfinite().all()):
            break
        r = X.mT @ gap / len(y)
        both.grad = signs * both.detach() * r
        squares += lr * r.square()
        optimizer.step()
    u, v = both.detach()
    if not gap.norm() < RESIDUAL:
        raise ValueError(
            f"analyze diagonal needs a run that converges, got |Xθ − y| = {float(gap.norm()):.3g} after {step} steps "
            f"at lr {lr:g}; lower --lam, or raise --start"
        )
    return u * u - v * v, squares, u * v


def diagonal_report(mu: float, lam: float, start: float, seed: int) -> Report:
    """Prediction and measurement of the solution, its exponents and how fast their errors fall with the step.

    Args: lam: η/(1 − μ)²; also a half and a quarter of it are run.
    Raises: ValueError for μ outside [0, 1), steps or starts that are not positive, or runs that do not converge.
    """
    method = heavy_ball("analyze diagonal", mu)
    check_positive("analyze diagonal", "lam", lam)
    check_positive("analyze diagonal", "start", start)
    X, y = sparse_problem(seed)
    scale = torch.full((UNKNOWNS,), start**2, dtype=torch.float64)
    plain = implicit_bias(X, y, scale)
    sizes = [lam, lam / 2, lam / 4]
    exponents, ours, theirs = [], [], []
    for size in sizes:
        lr = size * (1 - mu) ** 2
        theta, squares, product = train_diagonal(X, y, start, lr, mu)
        predicted, measured = shrinkage(method, lr, squares), (product / start**2).log()
        found = momentum_bias(X, y, scale, method, lr, squares)
        exponents.append(_relative(measured, predicted))
        ours.append(_relative(theta, found))
        theirs.append(_relative(theta, plain))
    order = measured.argsort()
    entries = range(1, UNKNOWNS + 1)
    smallest = f"at {sizes[-1]:.3g}, relative"
    return Report(
        f"Diagonal networks: μ = {mu:g}",
        "converged",
        f"Momentum ends where gradient flow would end from an initialisation that is smaller by up to "
        f"{float(-measured.min()):.2g} in ln(u v).",
        [
            ("error of ln(u v)", f"{exponents[-1]:.2%}", smallest),
            ("error of the solution", f"{ours[-1]:.1e}", smallest),
            ("without the shrinkage", f"{theirs[-1]:.1e}", "gradient flow's own solution"),
            ("its fall per halving", f"{ours[-2] / ours[-1]:.2f}", "4 is second order"),
            ("and without", f"{theirs[-2] / theirs[-1]:.2f}", "2 is first order"),
        ],
        [
            (
                "Shrinkage of the initialisation",
                figures.curves(
                    {"predicted": (entries, -predicted[order].numpy())},
                    "coordinate, sorted (number)",
                    "fall of ln(u v) (no unit)",
                    dots={"measured": (entries, -measured[order].numpy())},
                    logs="y",
                ),
                f"RiemannianSGD at η/(1 − μ)² = {sizes[-1]:.3g}; the line is 4η(1 + μ)/(1 − μ)³ ∫ r² dt.",
            ),
            (
                "Error of the solution",
                figures.curves(
                    {"with shrinkage": (sizes, ours), "gradient flow's": (sizes, theirs)},
                    STEP_SIZE,
                    "relative distance (no unit)",
                    dots={"": (sizes, ours)},
                    logs="xy",
                    columns=2,
                ),
                "Distance from the optimizer's limit to the predicted minimiser of Q.",
            ),
        ],
        settings={"mu": mu, "lam": lam, "start": start, "seed": seed},
    )


def _relative(measured: Tensor, predicted: Tensor) -> float:
    return float((measured - predicted).norm() / measured.norm().clamp_min(1e-300))
