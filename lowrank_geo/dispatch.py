"""One decision: plain torch or Triton kernels. The only module that loads the kernels and reads the environment.

LOWRANK_GEO_BACKEND = auto (Triton for CUDA tensors where it works), torch, or triton (also in Triton's interpreter,
with TRITON_INTERPRET=1). What no kernel takes (float64, ranks above 1024, steps that are differentiated, torch.func, a
GPU that Triton does not know) runs in torch, to the same result.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_geo import reference

BACKENDS = ("auto", "torch", "triton")
LARGEST_RANK = 1024
LAYER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_STACK = 65535  # programs a GPU has along the axis of a stack
_requested = os.environ.get("LOWRANK_GEO_BACKEND") or "auto"


class Backend(NamedTuple):
    """What runs, and why."""

    name: str  # "torch" or "triton"
    reason: str


def backend(device: torch.device | str | None = None) -> Backend:
    """Which backend float32 layers and optimizer steps on a device use: by default a GPU if there is one.

    Raises: ValueError for an unknown LOWRANK_GEO_BACKEND; RuntimeError if it is "triton" and Triton is not installed.

    >>> backend("cpu").name in ("torch", "triton")
    True
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    if requested() == "torch":
        return Backend("torch", "LOWRANK_GEO_BACKEND=torch")
    if requested() == "auto" and kind != "cuda":
        return Backend(
            "torch", f"LOWRANK_GEO_BACKEND=auto uses Triton for CUDA tensors, not on {kind}"
        )
    problem = _problem(kind)
    if problem is not None:
        return Backend("torch", problem)
    return Backend("triton", f"LOWRANK_GEO_BACKEND={requested()} and Triton works on {kind}")


def requested() -> str:
    """The setting, checked."""
    if _requested not in BACKENDS:
        raise ValueError(
            f"LOWRANK_GEO_BACKEND needs to be auto, torch or triton, got {_requested!r}; use one of them"
        )
    return _requested


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run with another setting than that of the environment.

    Raises: ValueError for an unknown name.

    >>> with use_backend("torch"):
    ...     backend().name
    'torch'
    """
    global _requested
    before, _requested = _requested, name
    try:
        requested()
        yield
    finally:
        _requested = before


def _problem(kind: str) -> str | None:
    """Why kernels cannot run on this kind of device; None if they can."""
    try:
        from lowrank_geo.kernels.tiles import interpreted
    except ImportError:
        if requested() == "triton":
            raise RuntimeError(
                "LOWRANK_GEO_BACKEND=triton needs Triton, got none installed; pip install triton or set it to auto"
            ) from None
        return "Triton is not installed"
    if interpreted():
        return None if kind in ("cpu", "cuda") else f"Triton's interpreter does not know {kind}"
    if kind != "cuda":
        return f"Triton needs a GPU, or TRITON_INTERPRET=1 at the start, on {kind}"
    from lowrank_geo.kernels.driver import PROBLEM

    return PROBLEM


def _may_run_kernels(x: Tensor) -> bool:
    """Whether the setting asks for kernels on the device of x."""
    setting = requested()
    return setting == "triton" or (setting == "auto" and x.is_cuda)


def _chosen(name: str, *tensors: Tensor | None) -> Callable[..., Any]:
    """The operator for these tensors: stacks of float32 matrices on one device, none of which wants a gradient."""
    first = tensors[0]
    assert first is not None
    if not _may_run_kernels(first):
        return getattr(reference, name)
    given = [x for x in tensors if x is not None]
    fits = (
        backend(first.device).name == "triton"
        and first.shape[-1] <= LARGEST_RANK
        and first.shape[0] <= LARGEST_STACK
        and all(x.dim() == 3 and x.dtype == torch.float32 and x.numel() > 0 for x in given)
        and all(x.device == first.device for x in given)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
        and not torch._C._are_functorch_transforms_active()
    )
    return _kernel(name) if fits else getattr(reference, name)


def _kernel(name: str) -> Callable[..., Any]:
    from lowrank_geo import binding

    return getattr(binding, name)


def layer_kernel(
    x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The tangent layer as one differentiable operator of (x, U, S, V, bias), or None where torch does it."""
    if not _may_run_kernels(x):
        return None
    given = [z for z in (x, U, S, V, bias) if z is not None]
    r = S.shape[-1]
    fits = (
        backend(x.device).name == "triton"
        and r <= LARGEST_RANK
        and x.dtype in LAYER_DTYPES
        and all(z.dtype == torch.float32 for z in (U, S, V))
        and all(z.device == x.device and z.numel() > 0 for z in given)
        and not torch._C._are_functorch_transforms_active()
    )
    return _kernel("lowrank_linear") if fits else None


def tangent(
    Z: Tensor,
    U: Tensor | None = None,
    C: Tensor | None = None,
    R: Tensor | None = None,
    momentum: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `lowrank_geo.reference.tangent`; g is Z itself where there are no products."""
    given = (Z, U, C, R, momentum)
    g, m, out = _chosen("tangent", *given)(*given, weights)
    return g if g.numel() else Z, m, out


def runs_kernels(*tensors: Tensor) -> bool:
    """Whether operations on these stacks run as kernels, for those who prepare other arguments for them."""
    return _chosen("tangent", *tensors) is not reference.tangent


def transport(
    U: Tensor,
    V: Tensor,
    Up: Tensor,
    M: Tensor,
    Vp: Tensor,
    U1: Tensor,
    V1: Tensor,
    UtU1: Tensor,
    VtV1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `lowrank_geo.reference.transport`."""
    given = (U, V, Up, M, Vp, U1, V1, UtU1, VtV1)
    return _chosen("transport", *given)(*given)


def retract(
    U: Tensor, A: Tensor, Up: Tensor, B: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `lowrank_geo.reference.retract`."""
    return _chosen("retract", U, A, Up, B)(U, A, Up, B)


def polar(
    U: Tensor, D: Tensor, X: Tensor | None = None, still: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `lowrank_geo.reference.polar`."""
    Q, carried = _chosen("polar", U, D, X)(U, D, X, still)
    return Q, None if X is None else carried


def spectral(X: Tensor, damping: float = 1e-3) -> Tensor:
    """As `lowrank_geo.reference.spectral`; kernels take tall matrices only."""
    tall = X.shape[-2] > X.shape[-1]
    return (_chosen("spectral", X) if tall else reference.spectral)(X, damping)


def damped_factor(X: Tensor, damping: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """As `lowrank_geo.reference.damped_factor`."""
    return _chosen("damped_factor", X)(X, damping)


def apply(X: Tensor, C: Tensor, d: Tensor) -> Tensor:
    """As `lowrank_geo.reference.apply`."""
    return _chosen("apply", X, C)(X, C, d)
