"""One side of a tangent vector out of an ambient product, and the momentum filter, in one pass:

    g = Z R − U C        m ← u m + v g        out = a g + b m

Z is G V or ∂L/∂U-like, C = UᵀZ its part to remove (gauge projection), R the factor of a metric (Sᵀ in the product
metric). Every part but Z may be missing: the epilogue of the layer's backward has no filter, the step of the embedded
metric no products.

Bytes: with filter and R, read Z, m, write g, m, out: 20·rows·r; the torch twin: 76·rows·r. With C alone: read Z, U,
write g: 12·rows·r, as one `addmm`. Column tiles of 128: for larger r, Z and U are read from the cache once more a tile.
Torch twin: `lowrank_geo.reference.tangent`. Accumulates in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lowrank_geo.kernels.tiles import add_product, precision, put, stacked, tile, tile_size


@triton.jit
def _tangent_kernel(
    Z, U, C, R, momentum, weights, g_out, m_out, out, rows, r,
    Z_batch, Z_row, U_batch, U_row, m_batch, m_row,
    GAUGE: tl.constexpr, SCALE: tl.constexpr, FILTER: tl.constexpr, KEEP: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * W + tl.arange(0, W)
    Z += matrix * Z_batch
    small, tall = matrix * r * r, matrix * rows * r
    g = tl.zeros((BLOCK, W), tl.float32)
    if GAUGE:
        g = -add_product(
            g, U + matrix * U_batch, C + small, at, cols, rows, r, r, U_row, K, PRECISION
        )
    if SCALE:
        g = add_product(g, Z, R + small, at, cols, rows, r, r, Z_row, K, PRECISION)
    else:
        g += tile(Z, at, cols, rows, r, Z_row).to(tl.float32)
    if KEEP:
        put(g_out + tall, g, at, cols, rows, r, r)
    if FILTER:
        w = weights + matrix * 4
        m = tile(momentum + matrix * m_batch, at, cols, rows, r, m_row).to(tl.float32)
        m = tl.load(w) * m + tl.load(w + 1) * g
        put(m_out + tall, m, at, cols, rows, r, r)
        put(out + tall, tl.load(w + 2) * g + tl.load(w + 3) * m, at, cols, rows, r, r)


def tangent(
    Z: Tensor,
    U: Tensor | None = None,
    C: Tensor | None = None,
    R: Tensor | None = None,
    momentum: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(g, m, out) in float32; without a filter only g has elements, without products g is Z and has none.

    Shapes: Z, U, momentum (L, rows, r), C, R (L, r, r), weights (L, 4) = (u, v, a, b) -> thrice (L, rows, r).
    """
    Z = stacked(Z)
    U = Z if U is None else stacked(U)
    old = Z if momentum is None else stacked(momentum)
    L, rows, r = Z.shape
    keep = C is not None or R is not None or momentum is None
    g = Z.new_empty(Z.shape if keep else (0,), dtype=torch.float32)
    m, out = (
        Z.new_empty(Z.shape if weights is not None else (0,), dtype=torch.float32) for _ in "mo"
    )
    W, K, block = tile_size(r, 128), tile_size(r, 32), 64
    wrap_triton(_tangent_kernel)[(triton.cdiv(rows, block), triton.cdiv(r, W), L)](
        Z, U, Z if C is None else C.contiguous(), Z if R is None else R.contiguous(), old,
        Z if weights is None else weights, g, m, out, rows, r,
        Z.stride(0), Z.stride(1), U.stride(0), U.stride(1), old.stride(0), old.stride(1),
        GAUGE=C is not None, SCALE=R is not None, FILTER=weights is not None, KEEP=keep,
        W=W, K=K, BLOCK=block, PRECISION=precision(Z), num_warps=8,
    )  # fmt: skip
    return g, m, out
