"""One side of a tangent vector, moved from the frame U to the frame U1: one pass forms Grams, one writes.

    Grams:  UᵀU1, UpᵀU1        write:  Up1 = U A + Up B − U1 C

with r×r matrices A, B, C made of the Grams of both sides (`lowrank_geo.operators.transport`); K = U M + Up and the
ambient products are never formed.

Bytes: the Grams read U, Up, U1 (12·rows·r), the write reads them again and writes Up1 (16·rows·r): 28·rows·r, and 24
where UᵀU1 is known, so that `gram` takes UpᵀU1 alone. The torch twin: 48 and 40. Holding a slice of rows on chip
between the passes would save 12, and needs a grid-wide barrier.
Torch twin: `lowrank_geo.reference.transport`. Accumulates in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lowrank_geo.kernels.tiles import add_product, precision, put, slices, stacked, tile, tile_size


@triton.jit
def _grams_kernel(
    U, Up, U1, out, rows, r, each, U_batch, U_row, Up_batch, Up_row, U1_batch, U1_row,
    P: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(r, P)
    pair, part, matrix = (
        tl.program_id(0),
        tl.program_id(1).to(tl.int64),
        tl.program_id(2).to(tl.int64),
    )
    left = (pair // across) * P + tl.arange(0, P)
    right = (pair % across) * P + tl.arange(0, P)
    U += matrix * U_batch
    Up += matrix * Up_batch
    U1 += matrix * U1_batch
    first = part * each
    last = tl.minimum(first + each, rows)
    one = tl.zeros((P, P), tl.float32)
    two = tl.zeros((P, P), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        to = tile(U1, at, right, last, r, U1_row)
        one = tl.dot(
            tl.trans(tile(U, at, left, last, r, U_row)), to, one, input_precision=PRECISION
        )
        two = tl.dot(
            tl.trans(tile(Up, at, left, last, r, Up_row)), to, two, input_precision=PRECISION
        )
    L = tl.num_programs(2)
    put(out + (part * 2 * L + matrix) * r * r, one, left, right, r, r, r)
    put(out + (part * 2 * L + L + matrix) * r * r, two, left, right, r, r, r)


def transport_grams(U: Tensor, Up: Tensor, U1: Tensor) -> tuple[Tensor, Tensor]:
    """UᵀU1 and UpᵀU1 in one pass.

    Shapes: U, Up, U1 (L, rows, r) -> twice (L, r, r).
    """
    U, Up, U1 = stacked(U), stacked(Up), stacked(U1)
    L, rows, r = U.shape
    P, block = tile_size(r), 32
    pairs = triton.cdiv(r, P) ** 2
    parts, each = slices(rows, block, pairs * L)
    out = U.new_empty(parts, 2, L, r, r, dtype=torch.float32)
    wrap_triton(_grams_kernel)[(pairs, parts, L)](
        U, Up, U1, out, rows, r, each,
        U.stride(0), U.stride(1), Up.stride(0), Up.stride(1), U1.stride(0), U1.stride(1),
        P=P, BLOCK=block, PRECISION=precision(U), num_warps=4,
    )  # fmt: skip
    total = out.sum(0)
    return total[0], total[1]


@triton.jit
def _write_kernel(
    U, Up, U1, A, B, C, out, rows, r, U_batch, U_row, Up_batch, Up_row, U1_batch, U1_row,
    W: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * W + tl.arange(0, W)
    small = matrix * r * r
    total = tl.zeros((BLOCK, W), tl.float32)
    total = -add_product(
        total, U1 + matrix * U1_batch, C + small, at, cols, rows, r, r, U1_row, K, PRECISION
    )
    total = add_product(
        total, U + matrix * U_batch, A + small, at, cols, rows, r, r, U_row, K, PRECISION
    )
    total = add_product(
        total, Up + matrix * Up_batch, B + small, at, cols, rows, r, r, Up_row, K, PRECISION
    )
    put(out + matrix * rows * r, total, at, cols, rows, r, r)


def transport_write(U: Tensor, Up: Tensor, U1: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """U A + Up B − U1 C in float32.

    Shapes: U, Up, U1 (L, rows, r), A, B, C (L, r, r) -> (L, rows, r).
    """
    U, Up, U1 = stacked(U), stacked(Up), stacked(U1)
    A, B, C = A.contiguous(), B.contiguous(), C.contiguous()
    L, rows, r = U.shape
    out = U.new_empty(L, rows, r, dtype=torch.float32)
    W, K, block = tile_size(r, 128), tile_size(r, 32), 64
    wrap_triton(_write_kernel)[(triton.cdiv(rows, block), triton.cdiv(r, W), L)](
        U, Up, U1, A, B, C, out, rows, r,
        U.stride(0), U.stride(1), Up.stride(0), Up.stride(1), U1.stride(0), U1.stride(1),
        W=W, K=K, BLOCK=block, PRECISION=precision(U), num_warps=8,
    )  # fmt: skip
    return out
