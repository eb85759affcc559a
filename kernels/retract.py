"""Orthonormal bases of K = U A + Up B, the moved frames of the orthographic and the splitting retraction.

    stretch:  K and KᵀK in one pass        regram:  Gram of K T        settle:  Q = K T, or U where K = 0
    products: UᵀQ and KᵀQ in one pass

T (r, r) is a product of inverse Cholesky factors, formed between the passes (`lowrank_geo.operators.retract`): shifted
Cholesky QR without ever storing an unfinished Q. Grams, T and K T are float64, K is float32: a float64 Gram of float32
numbers neither overflows nor loses the singular values that a float32 one does past a condition number of 1e4.

Bytes: |K|_F needs the Gram of Up (4·rows·r); stretch reads U, Up and writes K (12; its Gram is free up to r = 64, for
larger r the tiles of K are computed again for every pair of tiles, up to r = 128, and read again beyond, 4); two
regrams read K (8), settle reads K and writes Q (8), the products read U, K, Q (12): 44·rows·r. The
torch twin, which keeps a float64 Q: 304·rows·r.
Torch twin: `lowrank_geo.reference.retract`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lowrank_geo.kernels.tiles import (
    add_product,
    precision,
    put,
    slices,
    stacked,
    tile,
    tile_pair,
    tile_size,
)

FUSED = 128  # largest rank whose K is computed again for every pair of tiles


@triton.jit
def _columns(
    U, A, Up, B, rows, cols, height, r, U_row, Up_row,
    HAS_B: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(U A + Up B)[rows, cols]."""
    total = tl.zeros((BLOCK, W), tl.float32)
    total = add_product(total, U, A, rows, cols, height, r, r, U_row, K, PRECISION)
    if HAS_B:
        return add_product(total, Up, B, rows, cols, height, r, r, Up_row, K, PRECISION)
    else:
        return total + tile(Up, rows, cols, height, r, Up_row)


@triton.jit
def _stretch_kernel(
    U, A, Up, B, K_out, gram, rows, r, each, U_batch, U_row, Up_batch, Up_row,
    HAS_B: tl.constexpr, GRAM: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i, j, part, matrix = tile_pair(r, P)
    if not GRAM:  # the tiles of K alone
        i = j
    if i > j:  # the Gram is symmetric
        return
    left, right = i * P + tl.arange(0, P), j * P + tl.arange(0, P)
    U += matrix * U_batch
    Up += matrix * Up_batch
    A += matrix * r * r
    B += matrix * r * r
    first = part * each
    last = tl.minimum(first + each, rows)
    total = tl.zeros((P, P), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        k = _columns(U, A, Up, B, at, right, last, r, U_row, Up_row, HAS_B, P, K, BLOCK, PRECISION)
        if i == j:
            put(K_out + matrix * rows * r, k, at, right, last, r, r)
        if GRAM:
            other = _columns(
                U, A, Up, B, at, left, last, r, U_row, Up_row, HAS_B, P, K, BLOCK, PRECISION
            )
            total = tl.dot(tl.trans(other).to(tl.float64), k.to(tl.float64), total)
    if GRAM:
        gram += (part * tl.num_programs(2) + matrix) * r * r
        put(gram, total, left, right, r, r, r)
        if i < j:
            put(gram, tl.trans(total), right, left, r, r, r)


def stretch(U: Tensor, A: Tensor, Up: Tensor, B: Tensor | None) -> tuple[Tensor, Tensor]:
    """K = U A + Up B (B = I if missing) in float32, and its Gram in float64.

    Shapes: U, Up (L, rows, r), A, B (L, r, r) -> K (L, rows, r), KᵀK (L, r, r).
    """
    U, Up, A = stacked(U), stacked(Up), A.contiguous()
    L, rows, r = U.shape
    P, block, fused = tile_size(r), 32, r <= FUSED
    tiles = triton.cdiv(r, P)
    pairs = tiles**2 if fused else tiles
    parts, each = slices(rows, block, pairs * L)
    K = U.new_empty(L, rows, r, dtype=torch.float32)
    gram = U.new_empty((parts, L, r, r) if fused else (0,), dtype=torch.float64)
    wrap_triton(_stretch_kernel)[(pairs, parts, L)](
        U, A, Up, A if B is None else B.contiguous(), K, gram, rows, r, each,
        U.stride(0), U.stride(1), Up.stride(0), Up.stride(1),
        HAS_B=B is not None, GRAM=fused, P=P, K=tile_size(r, 32), BLOCK=block,
        PRECISION=precision(U), num_warps=8,
    )  # fmt: skip
    return K, gram.sum(0) if fused else regram(K, None)


@triton.jit
def _regram_kernel(
    X, T, gram, rows, r, each,
    TURN: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, j, part, matrix = tile_pair(r, P)
    if i > j:
        return
    left, right = i * P + tl.arange(0, P), j * P + tl.arange(0, P)
    X += matrix * rows * r
    T += matrix * r * r
    first = part * each
    last = tl.minimum(first + each, rows)
    total = tl.zeros((P, P), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if TURN:
            x = tl.zeros((BLOCK, P), tl.float64)
            y = tl.zeros((BLOCK, P), tl.float64)
            x = add_product(x, X, T, at, left, last, r, r, r, K, "ieee")
            y = add_product(y, X, T, at, right, last, r, r, r, K, "ieee")
        else:
            x = tile(X, at, left, last, r, r).to(tl.float64)
            y = tile(X, at, right, last, r, r).to(tl.float64)
        total = tl.dot(tl.trans(x), y, total)
    gram += (part * tl.num_programs(2) + matrix) * r * r
    put(gram, total, left, right, r, r, r)
    if i < j:
        put(gram, tl.trans(total), right, left, r, r, r)


def regram(K: Tensor, T: Tensor | None) -> Tensor:
    """(K T)ᵀ(K T) in float64, T = I if missing.

    Shapes: K (L, rows, r), contiguous, T (L, r, r) in float64 -> (L, r, r).
    """
    L, rows, r = K.shape
    P, block = tile_size(r), 32
    pairs = triton.cdiv(r, P) ** 2
    parts, each = slices(rows, block, pairs * L)
    gram = K.new_empty(parts, L, r, r, dtype=torch.float64)
    wrap_triton(_regram_kernel)[(pairs, parts, L)](
        K, K if T is None else T.contiguous(), gram, rows, r, each,
        TURN=T is not None, P=P, K=tile_size(r, 16), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return gram.sum(0)


@triton.jit
def _settle_kernel(
    X, T, U, zero, out, rows, r, U_batch, U_row,
    W: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * W + tl.arange(0, W)
    total = tl.zeros((BLOCK, W), tl.float64)
    total = add_product(
        total, X + matrix * rows * r, T + matrix * r * r, at, cols, rows, r, r, r, K, "ieee"
    )
    if tl.load(zero + matrix) != 0:
        total = tile(U + matrix * U_batch, at, cols, rows, r, U_row).to(tl.float64)
    put(out + matrix * rows * r, total, at, cols, rows, r, r)


def settle(K: Tensor, T: Tensor, U: Tensor, zero: Tensor) -> Tensor:
    """Q = K T in float32, or U for the matrices whose flag `zero` is set.

    Shapes: K (L, rows, r), contiguous, U (L, rows, r), T (L, r, r) in float64, zero (L) -> (L, rows, r).
    """
    U = stacked(U)
    L, rows, r = K.shape
    out = K.new_empty(L, rows, r)
    W, block = tile_size(r), 32
    wrap_triton(_settle_kernel)[(triton.cdiv(rows, block), triton.cdiv(r, W), L)](
        K, T.contiguous(), U, zero.to(torch.int32), out, rows, r, U.stride(0), U.stride(1),
        W=W, K=tile_size(r, 16), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _products_kernel(
    U, K, Q, out, rows, r, each, U_batch, U_row, K_batch, K_row, Q_batch, Q_row,
    P: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, j, part, matrix = tile_pair(r, P)
    left = i * P + tl.arange(0, P)
    right = j * P + tl.arange(0, P)
    U += matrix * U_batch
    K += matrix * K_batch
    Q += matrix * Q_batch
    first = part * each
    last = tl.minimum(first + each, rows)
    one = tl.zeros((P, P), tl.float32)
    two = tl.zeros((P, P), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        to = tile(Q, at, right, last, r, Q_row)
        one = tl.dot(
            tl.trans(tile(U, at, left, last, r, U_row)), to, one, input_precision=PRECISION
        )
        two = tl.dot(
            tl.trans(tile(K, at, left, last, r, K_row)), to, two, input_precision=PRECISION
        )
    L = tl.num_programs(2)
    put(out + (part * 2 * L + matrix) * r * r, one, left, right, r, r, r)
    put(out + (part * 2 * L + L + matrix) * r * r, two, left, right, r, r, r)


def products(U: Tensor, K: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """UᵀQ and KᵀQ in one pass, in float32.

    Shapes: U, K, Q (L, rows, r) -> twice (L, r, r).
    """
    U, K, Q = stacked(U), stacked(K), stacked(Q)
    L, rows, r = U.shape
    P, block = tile_size(r), 32
    pairs = triton.cdiv(r, P) ** 2
    parts, each = slices(rows, block, pairs * L)
    out = U.new_empty(parts, 2, L, r, r, dtype=torch.float32)
    wrap_triton(_products_kernel)[(pairs, parts, L)](
        U, K, Q, out, rows, r, each,
        U.stride(0), U.stride(1), K.stride(0), K.stride(1), Q.stride(0), Q.stride(1),
        P=P, BLOCK=block, PRECISION=precision(U), num_warps=4,
    )  # fmt: skip
    total = out.sum(0)
    return total[0], total[1]
