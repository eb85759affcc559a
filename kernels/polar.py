"""The product metric's retraction and the projection of its momentum, on one side:

    Grams:  UᵀU, UᵀD, DᵀD, UᵀX, DᵀX        write:  U1 = U A + D B,   X1 = X − U A P − D B P

With the polar factor Z = Gram(U + s D)^(−½): A = Z, B = s Z and P = U1ᵀX, all r×r (`lowrank_geo.operators.polar`). A
matrix whose flag `still` is set keeps its U bit for bit.

Bytes: one pass reads U, D, X, one reads them again and writes U1, X1: 32·rows·r (20 without X), and the largest entry
of D reads it once more, 4. The torch twin: 128·rows·r.
Torch twin: `lowrank_geo.reference.polar`. Accumulates in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lowrank_geo.kernels.tiles import precision, put, slices, stacked, tile, tile_pair, tile_size


@triton.jit
def _grams_kernel(
    U, D, X, divisor, out, rows, r, each, U_batch, U_row, D_batch, D_row, X_batch, X_row,
    CARRY: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, j, part, matrix = tile_pair(r, P)
    left = i * P + tl.arange(0, P)
    right = j * P + tl.arange(0, P)
    U += matrix * U_batch
    D += matrix * D_batch
    X += matrix * X_batch
    by = tl.load(divisor + matrix)
    first = part * each
    last = tl.minimum(first + each, rows)
    uu = tl.zeros((P, P), tl.float32)
    ud = tl.zeros((P, P), tl.float32)
    dd = tl.zeros((P, P), tl.float32)
    ux = tl.zeros((P, P), tl.float32)
    dx = tl.zeros((P, P), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        u = tl.trans(tile(U, at, left, last, r, U_row))
        d = tl.trans(tile(D, at, left, last, r, D_row) / by)
        to = tile(D, at, right, last, r, D_row) / by
        uu = tl.dot(u, tile(U, at, right, last, r, U_row), uu, input_precision=PRECISION)
        ud = tl.dot(u, to, ud, input_precision=PRECISION)
        dd = tl.dot(d, to, dd, input_precision=PRECISION)
        if CARRY:
            x = tile(X, at, right, last, r, X_row)
            ux = tl.dot(u, x, ux, input_precision=PRECISION)
            dx = tl.dot(d, x, dx, input_precision=PRECISION)
    L, size = tl.num_programs(2).to(tl.int64), r * r
    out += (part * (5 if CARRY else 3) * L + matrix) * size
    step = L * size
    put(out, uu, left, right, r, r, r)
    put(out + step, ud, left, right, r, r, r)
    put(out + 2 * step, dd, left, right, r, r, r)
    if CARRY:
        put(out + 3 * step, ux, left, right, r, r, r)
        put(out + 4 * step, dx, left, right, r, r, r)


def polar_grams(U: Tensor, D: Tensor, X: Tensor | None, divisor: Tensor) -> Tensor:
    """UᵀU, UᵀD, DᵀD and, with X, UᵀX, DᵀX, where D is divided by d first.

    Shapes: U, D, X (L, rows, r), d (L) -> (3 or 5, L, r, r).
    """
    U, D = stacked(U), stacked(D)
    Y = D if X is None else stacked(X)
    L, rows, r = U.shape
    P, block = tile_size(r, 32), 32
    pairs = triton.cdiv(r, P) ** 2
    parts, each = slices(rows, block, pairs * L)
    out = U.new_empty(parts, 3 if X is None else 5, L, r, r, dtype=torch.float32)
    wrap_triton(_grams_kernel)[(pairs, parts, L)](
        U, D, Y, divisor, out, rows, r, each,
        U.stride(0), U.stride(1), D.stride(0), D.stride(1), Y.stride(0), Y.stride(1),
        CARRY=X is not None, P=P, BLOCK=block, PRECISION=precision(U), num_warps=8,
    )  # fmt: skip
    return out.sum(0)


@triton.jit
def _write_kernel(
    U, D, X, divisor, A, B, AP, BP, still, U1, X1, rows, r, U_batch, U_row, D_batch, D_row, X_batch, X_row,
    CARRY: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * W + tl.arange(0, W)
    U += matrix * U_batch
    D += matrix * D_batch
    by = tl.load(divisor + matrix)
    small, tall = matrix * r * r, matrix * rows * r
    frame = tl.zeros((BLOCK, W), tl.float32)
    spent = tl.zeros((BLOCK, W), tl.float32)
    for k in range(0, r, K):
        inner = k + tl.arange(0, K)
        u = tile(U, at, inner, rows, r, U_row)
        d = tile(D, at, inner, rows, r, D_row) / by
        frame = tl.dot(u, tile(A + small, inner, cols, r, r, r), frame, input_precision=PRECISION)
        frame = tl.dot(d, tile(B + small, inner, cols, r, r, r), frame, input_precision=PRECISION)
        if CARRY:
            spent = tl.dot(
                u, tile(AP + small, inner, cols, r, r, r), spent, input_precision=PRECISION
            )
            spent = tl.dot(
                d, tile(BP + small, inner, cols, r, r, r), spent, input_precision=PRECISION
            )
    if tl.load(still + matrix) != 0:
        frame = tile(U, at, cols, rows, r, U_row)
    put(U1 + tall, frame, at, cols, rows, r, r)
    if CARRY:
        x = tile(X + matrix * X_batch, at, cols, rows, r, X_row)
        put(X1 + tall, x - spent, at, cols, rows, r, r)


def polar_write(
    U: Tensor,
    D: Tensor,
    X: Tensor | None,
    divisor: Tensor,
    A: Tensor,
    B: Tensor,
    P: Tensor | None,
    still: Tensor,
) -> tuple[Tensor, Tensor]:
    """U1 = U A + (D/d) B, or U where `still`, and X1 = X − (U A + (D/d) B) P; without X, X1 is empty.

    Shapes: U, D, X (L, rows, r), d, still (L), A, B, P (L, r, r) -> twice (L, rows, r).
    """
    U, D = stacked(U), stacked(D)
    Y = D if X is None else stacked(X)
    A, B = A.contiguous(), B.contiguous()
    AP, BP = (A, B) if P is None else (A @ P, B @ P)
    L, rows, r = U.shape
    U1 = U.new_empty(L, rows, r, dtype=torch.float32)
    X1 = U.new_empty((0,) if X is None else (L, rows, r), dtype=torch.float32)
    W, K, block = tile_size(r, 64), 16, 64
    wrap_triton(_write_kernel)[(triton.cdiv(rows, block), triton.cdiv(r, W), L)](
        U, D, Y, divisor, A, B, AP, BP, still.to(torch.int32), U1, X1, rows, r,
        U.stride(0), U.stride(1), D.stride(0), D.stride(1), Y.stride(0), Y.stride(1),
        CARRY=X is not None, W=W, K=K, BLOCK=block, PRECISION=precision(U), num_warps=8,
    )  # fmt: skip
    return U1, X1
