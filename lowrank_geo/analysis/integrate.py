"""One interval of a flow: a fixed step in torch, or scipy's adaptive one."""

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-12


def rk4(field: Callable[[Tensor], Tensor], x: Tensor, time: float, substeps: int) -> Tensor:
    """x after `time` along the field, by the classical Runge-Kutta method.

    Shapes: (...) -> (...).

    >>> rk4(lambda x: -x, torch.ones(1, dtype=torch.float64), 0.1, 4)  # e^-0.1
    tensor([0.9048], dtype=torch.float64)
    """
    h = time / substeps
    for _ in range(substeps):
        k1 = field(x)
        k2 = field(x + h / 2 * k1)
        k3 = field(x + h / 2 * k2)
        k4 = field(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def dop853(field: Callable[[Tensor], Tensor], x: Tensor, time: float, substeps: int) -> Tensor:
    """The same by scipy's Dormand-Prince method of order 8, on as many steps as 1e-12 takes; float64, CPU.

    Shapes: (d) -> (d).
    Raises: ModuleNotFoundError, with the command to install it, without scipy.
    """
    try:
        from scipy.integrate import solve_ivp
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "integrator 'dop853' needs scipy, got none; pip install 'lowrank-geo[analysis]'"
        ) from missing

    def slope(_: float, y: object) -> object:
        return field(torch.as_tensor(y, dtype=x.dtype)).numpy()

    span = (0.0, time)
    solution = solve_ivp(slope, span, x.numpy(), "DOP853", rtol=TOLERANCE, atol=TOLERANCE)
    return torch.as_tensor(solution.y[:, -1].copy(), dtype=x.dtype)
