"""One side of a tangent vector, moved from the frame U to the frame U1: the write pass Up1 = U A + Up B − U1 C.

A, B, C (r, r) are made of UᵀU1, which the retraction knows, and UpᵀU1 (`gram`), of both sides
(`lowrank_geo.operators.transport`); K = U M + Up and the ambient products are never formed.

Bytes: the Gram reads Up and U1 (8·rows·r), the write reads U, Up, U1 and writes Up1 (16·rows·r): 24·rows·r. The torch
twin: 40. Holding a slice of rows on chip between the passes would save 8, and needs a grid-wide barrier.
Torch twin: `lowrank_geo.reference.transport`. Accumulates in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lowrank_geo.kernels.tiles import add_product, precision, put, stacked, tile_size


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
