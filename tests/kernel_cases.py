"""Inputs of every kernel operation, by name; run on a GPU where there is one and in Triton's interpreter elsewhere."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_geo import geometry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

# L, m, n, r: one element, odd, wide, both ends of r within reach of an interpreter
SHAPES = [
    (1, 1, 1, 1),
    (3, 37, 29, 1),
    (2, 40, 37, 5),
    (1, 33, 80, 33),
    (2, 70, 130, 64),
    (1, 150, 101, 97),
]
LARGE = (1, 262, 261, 260)

Arguments = dict[str, tuple[Any, ...]]


def moved(*tensors: Tensor) -> list[Tensor]:
    """Drawn in float64, used in float32 on the device of the kernels."""
    return [x.to(DEVICE, torch.float32) for x in tensors]


def stacks(L: int, m: int, n: int, r: int) -> Arguments:
    """Arguments of the operations on stacks of matrices, in float32."""
    double = {"dtype": torch.float64}
    p = geometry.random(m, n, r, batch=(L,), **double)
    q = geometry.random(m, n, r, batch=(L,), **double)
    xi = geometry.project(p, torch.randn(L, m, n, **double))
    U, S, V, U1, V1, Up, M, Vp = moved(*p, q.U, q.V, *xi)
    X, B, C, w = moved(
        torch.randn(L, m, r), torch.randn(L, r, r), torch.randn(L, r, r), torch.rand(L, 4)
    )
    size = Up.abs().amax().clamp(min=1e-3)
    return {
        "tangent": (X, U, C, B, Up, w),
        "transport": (U, V, Up, M, Vp, U1, V1, U.mT @ U1, V.mT @ V1),
        "retract": (U, S, Up, B),
        "polar": (U, 0.1 * Up / size, X, torch.arange(L, device=DEVICE) == 1),
        "spectral": (X,),
        "damped_factor": (X,),
        "apply": (X, B, 1 + w[:, 0]),
    }


def layer(tokens: int, m: int, n: int, r: int, dtype: torch.dtype) -> Arguments:
    """Arguments of the layer's operations: activations in `dtype`, factors in float32."""
    U, S, V = moved(*geometry.random(m, n, r, dtype=torch.float64))
    x, g, bias = (torch.randn(*s).to(DEVICE) for s in ((tokens, n), (tokens, m), (m,)))
    x, g = x.to(dtype), g.to(dtype)
    a = (x.float() @ V).to(dtype)
    return {
        "lowrank_linear": (x, U, S, V, bias),
        "lowrank_linear_backward": (g, x, U, S, V, a, True),
    }


def mapped(arguments: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> list[Any]:
    """The arguments with `change` made to every floating tensor."""
    return [change(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def outputs(result: Any) -> tuple[Tensor, ...]:
    """What an operation returned, as tensors, without those that were not asked for."""
    results = result if isinstance(result, tuple) else (result,)
    return tuple(x for x in results if x is not None and x.numel())


def error(found: Tensor, wanted: Tensor, scale: Tensor | None = None) -> float:
    """|found − wanted|_F / |scale|_F; `scale` is what was wanted, unless that may vanish."""
    wanted = wanted.double()
    size = (wanted if scale is None else scale.double()).norm().clamp(min=1e-30)
    return ((found.double() - wanted).norm() / size).item()
