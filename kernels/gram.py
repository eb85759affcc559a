"""C = AᵀB summed over rows, of stacks: Grams of frames, and ∂L/∂yᵀ a of a layer, where the rows are tokens.

Bytes: A and B once each from memory for p, q <= 64 (every further tile of p reads B again and of q A again, from the
cache while a slice of rows fits there), slices·p·q·4 of partial sums. No fusion of two such products that share one
factor beats this: a program that holds both results needs its accumulators twice.
Torch twin: `lowrank_geo.reference.gram`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lowrank_geo.kernels.tiles import (
    interpreted,
    operand,
    precision,
    put,
    slices,
    stacked,
    tile,
    tile_pair,
    tile_size,
)


@triton.jit
def _gram_kernel(
    A, B, divisor, out, rows, p, q, each, A_batch, A_row, B_batch, B_row,
    P: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr, DIVIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i, j, part, matrix = tile_pair(q, Q)
    left = i * P + tl.arange(0, P)
    right = j * Q + tl.arange(0, Q)
    A += matrix * A_batch
    B += matrix * B_batch
    by = tl.load(divisor + matrix) if DIVIDE else 1.0
    first = part * each
    last = tl.minimum(first + each, rows)
    total = tl.zeros((P, Q), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tile(A, at, left, last, p, A_row)
        b = tile(B, at, right, last, q, B_row)
        if DIVIDE:
            a, b = a / by, b / by
        a, b = operand(a, A, UPCAST), operand(b, A, UPCAST)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    slot = part * tl.num_programs(2) + matrix
    put(out + slot * p * q, total, left, right, p, q, q)


def gram(A: Tensor, B: Tensor, divisor: Tensor | None = None, *, fast: bool = False) -> Tensor:
    """(A/d)ᵀ(B/d) in float32, of A and B of one dtype; `fast` takes float32 products in one TF32 product.

    Shapes: A (L, rows, p), B (L, rows, q), d (L) -> (L, p, q).
    """
    A, B = stacked(A), stacked(B)
    (L, rows, p), q = A.shape, B.shape[-1]
    P, Q, block = tile_size(p), tile_size(q), 32 if A.dtype == torch.float32 else 64
    pairs = triton.cdiv(p, P) * triton.cdiv(q, Q)
    parts, each = slices(rows, block, pairs * L)
    out = A.new_empty(parts, L, p, q, dtype=torch.float32)
    wrap_triton(_gram_kernel)[(pairs, parts, L)](
        A, B, A if divisor is None else divisor, out, rows, p, q, each,
        A.stride(0), A.stride(1), B.stride(0), B.stride(1),
        P=P, Q=Q, BLOCK=block, UPCAST=interpreted(), DIVIDE=divisor is not None,
        PRECISION="tf32" if fast else precision(A), num_warps=4,
    )  # fmt: skip
    return out.sum(0) if parts > 1 else out[0]
