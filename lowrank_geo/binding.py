"""torch.library operators of `lowrank_geo.operators`, so that torch.compile, fake tensors and autograd see them.

Compiled kernels become `triton_op`s, which a compiler looks into; interpreted ones `custom_op`s, which it calls. Only
the layer's operator has derivatives, first ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_geo import operators
from lowrank_geo.guard import refuse_derivative
from lowrank_geo.kernels.tiles import interpreted


def bind(run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator lowrank_geo::<name of run>, with outputs of the shapes and strides of `fake`."""
    define: Any = torch.library.custom_op if interpreted() else torch.library.triton_op
    operator = define(f"lowrank_geo::{run.__name__}", mutates_args=())(run)
    operator.register_fake(fake)
    return operator


def _core(U: Tensor) -> Tensor:
    """Shapes: (L, rows, r) -> (L, r, r)."""
    return U.new_empty(U.shape[0], U.shape[-1], U.shape[-1])


def _empty(A: Tensor) -> Tensor:
    """As A, contiguous, whatever the strides of A."""
    return A.new_empty(A.shape)


def _linear_fake(
    x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], U.shape[0]), x.new_empty(x.shape[0], U.shape[1])


def _linear_backward_fake(
    g: Tensor, x: Tensor, U: Tensor, S: Tensor, V: Tensor, a: Tensor, with_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = g.new_empty(x.shape if with_x else (0,))
    return dx, _empty(U), _empty(S), _empty(V)


def _tangent_fake(
    Z: Tensor,
    U: Tensor | None = None,
    C: Tensor | None = None,
    R: Tensor | None = None,
    momentum: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    keep = C is not None or R is not None or momentum is None
    filtered = Z.shape if weights is not None else (0,)
    shapes = (Z.shape if keep else (0,), filtered, filtered)
    g, m, out = (Z.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return g, m, out


def _transport_fake(
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
    return _empty(U), _empty(M), _empty(V)


def _retract_fake(
    U: Tensor, A: Tensor, Up: Tensor, B: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(U), _core(U), _core(U)


def _polar_fake(
    U: Tensor, D: Tensor, X: Tensor | None = None, still: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _empty(U), U.new_empty(0) if X is None else _empty(X)


def _spectral_fake(X: Tensor, damping: float = 0.0) -> Tensor:
    return _empty(X)


def _damped_factor_fake(X: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    return _core(X), _core(X), X.new_empty(X.shape[0])


def _apply_fake(X: Tensor, C: Tensor, d: Tensor) -> Tensor:
    return X.new_empty(*X.shape[:-1], C.shape[-1])


lowrank_linear = bind(operators.lowrank_linear, _linear_fake)
lowrank_linear_backward = bind(operators.lowrank_linear_backward, _linear_backward_fake)
tangent = bind(operators.tangent, _tangent_fake)
transport = bind(operators.transport, _transport_fake)
retract = bind(operators.retract, _retract_fake)
polar = bind(operators.polar, _polar_fake)
spectral = bind(operators.spectral, _spectral_fake)
damped_factor = bind(operators.damped_factor, _damped_factor_fake)
apply = bind(operators.apply, _apply_fake)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, U, S, V, bias = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, U, S, V, output[1])


def _backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple:
    if g is None:
        return (None,) * 5
    with_x = ctx.needs_input_grad[0]
    dx, *factors = lowrank_linear_backward(g, *ctx.saved_tensors, with_x)
    # An operator's inputs end before the arguments that are left at their default.
    wanted = ctx.bias_dtype is not None and ctx.needs_input_grad[4]
    bias = g.sum(0).to(ctx.bias_dtype) if wanted else None
    return dx if with_x else None, *factors, bias


def _refuse(ctx: Any, *_: Tensor) -> None:
    refuse_derivative("lowrank_linear", "second")


torch.library.register_autograd("lowrank_geo::lowrank_linear", _backward, setup_context=_keep)
torch.library.register_autograd("lowrank_geo::lowrank_linear_backward", _refuse)
