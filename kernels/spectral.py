"""The write pass of a matrix function of X: out = (X/d) C, with C (r, r) made from the Gram of X/d.

msign and the damped bases are one tall product in (`gram`) and this one out; all iterations are r×r.

Bytes: the largest entry d reads X, the Gram reads X, the write reads X and writes out: 16·rows·r. Without d, squares of
entries below 1e-23 vanish and those above 1e19 overflow in float32. The torch twin: 56·rows·r.
Torch twin: `lowrank_geo.reference.apply`. Accumulates in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lowrank_geo.kernels.tiles import precision, put, stacked, tile, tile_size


@triton.jit
def _apply_kernel(
    X, C, divisor, out, rows, r, q, X_batch, X_row, DIVIDE: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * W + tl.arange(0, W)
    X += matrix * X_batch
    C += matrix * r * q
    by = tl.load(divisor + matrix) if DIVIDE else 1.0
    total = tl.zeros((BLOCK, W), tl.float32)
    for k in range(0, r, K):
        inner = k + tl.arange(0, K)
        x = tile(X, at, inner, rows, r, X_row).to(tl.float32)
        if DIVIDE:
            x = x / by
        total = tl.dot(x, tile(C, inner, cols, r, q, q), total, input_precision=PRECISION)
    put(out + matrix * rows * q, total, at, cols, rows, q, q)


def apply(X: Tensor, C: Tensor, divisor: Tensor | None = None) -> Tensor:
    """(X/d) C in float32.

    Shapes: X (L, rows, r), C (L, r, q), d (L) -> (L, rows, q).
    """
    X, C = stacked(X), C.contiguous()
    (L, rows, r), q = X.shape, C.shape[-1]
    out = X.new_empty(L, rows, q, dtype=torch.float32)
    W, K, block = tile_size(q, 128), tile_size(r, 32), 64
    wrap_triton(_apply_kernel)[(triton.cdiv(rows, block), triton.cdiv(q, W), L)](
        X, C, X if divisor is None else divisor, out, rows, r, q, X.stride(0), X.stride(1),
        DIVIDE=divisor is not None, W=W, K=K, BLOCK=block, PRECISION=precision(X), num_warps=8,
    )  # fmt: skip
    return out
