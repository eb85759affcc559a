"""y = x V S'ᵀ Lᵀ + bias and a = x V, for the forward pass; with the factors exchanged, ∂L/∂x and b of the backward.

`left` is U S and `middle` missing for many tokens, U and Sᵀ for few. For r <= 128, or 64 for float32 in full, a block
of rows of a stays on chip between the two products; beyond that its accumulator and the parts of the factors do not fit
beside a tile of y, and the two products are two launches, tiled over r.

Bytes, in elements of x: read x, write a and y: B(n + r + m); two products read a again: B(n + 2r + m), and a separate
bias adds 2Bm. Backward: this kernel on ∂L/∂y (B(m + r + n)), then ∂L/∂yᵀa and xᵀb by `gram` (B(m + n + 2r)): ∂L/∂y
twice and x once. Taking ∂L/∂yᵀa in the first of these passes would save Bm and write a partial m×r for every program,
which is as much at 250 tokens a program.
Torch twin: `lowrank_geo.reference.lowrank_linear`. Accumulates in float32.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lowrank_geo.kernels.tiles import interpreted, operand, precision, put, tile, tile_size

ON_CHIP = 128  # largest rank of the fused kernel
ON_CHIP_EXACT = 64  # of float32, whose three TF32 products keep two parts of every factor


@triton.jit
def _fused_kernel(
    x, V, middle, left, bias, y, a, tokens, n, m, r, x_row,
    MIDDLE: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, R)
    total = tl.zeros((BLOCK, R), tl.float32)
    for start in range(0, n, N):
        at = start + tl.arange(0, N)
        part = operand(tile(x, rows, at, tokens, n, x_row), x, UPCAST)
        frame = operand(tile(V, at, inner, n, r, r), x, UPCAST)
        total = tl.dot(part, frame, total, input_precision=PRECISION)
    put(a, total, rows, inner, tokens, r, r)
    c = operand(total, x, UPCAST)
    if MIDDLE:
        core = operand(tile(middle, inner, inner, r, r, r), x, UPCAST)
        c = operand(tl.dot(c, core, input_precision=PRECISION), x, UPCAST)
    for start in range(0, m, M):
        at = start + tl.arange(0, M)
        frame = operand(tile(left, at, inner, m, r, r), x, UPCAST)
        out = tl.dot(c, tl.trans(frame), input_precision=PRECISION)
        if BIAS:
            out += tl.load(bias + at, mask=at < m, other=0.0).to(tl.float32)[None, :]
        put(y, out, rows, at, tokens, m, m)


@triton.jit
def _product_kernel(
    x, F, bias, out, tokens, n, q, x_row, F_inner, F_outer,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x F + bias for F (n, q) with any strides."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * Q + tl.arange(0, Q)
    total = tl.zeros((BLOCK, Q), tl.float32)
    for start in range(0, n, N):
        at = start + tl.arange(0, N)
        part = operand(tile(x, rows, at, tokens, n, x_row), x, UPCAST)
        inside = (at[:, None] < n) & (cols[None, :] < q)
        where = at[:, None].to(tl.int64) * F_inner + cols[None, :].to(tl.int64) * F_outer
        factor = operand(tl.load(F + where, mask=inside, other=0.0), x, UPCAST)
        total = tl.dot(part, factor, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + cols, mask=cols < q, other=0.0).to(tl.float32)[None, :]
    put(out, total, rows, cols, tokens, q, q)


def rows(x: Tensor) -> Tensor:
    """x with unit column stride; a copy only of other strides."""
    return x if x.stride(1) == 1 else x.contiguous()


def product(x: Tensor, F: Tensor, bias: Tensor | None = None, *, fast: bool = False) -> Tensor:
    """x F + bias in the dtype of x, with products in that dtype and sums in float32.

    Shapes: x (B, n) with unit column stride, F (n, q), bias (q) -> (B, q).
    """
    (tokens, n), q = x.shape, F.shape[-1]
    out = x.new_empty(tokens, q)
    block, N, Q = 64, 32, tile_size(q)
    wrap_triton(_product_kernel)[(triton.cdiv(tokens, block), triton.cdiv(q, Q))](
        x, F, x if bias is None else bias, out, tokens, n, q, x.stride(0), F.stride(0), F.stride(1),
        BIAS=bias is not None, BLOCK=block, N=N, Q=Q,
        UPCAST=interpreted(), PRECISION="tf32" if fast else precision(x),
        num_warps=4,
    )  # fmt: skip
    return out


def lowrank_linear(
    x: Tensor,
    V: Tensor,
    middle: Tensor | None,
    left: Tensor,
    bias: Tensor | None = None,
    *,
    fast: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = x V middle leftᵀ + bias and a = x V, in the dtype of x; `fast` multiplies float32 in TF32.

    Shapes: x (B, n), V (n, r), middle (r, r), left (m, r), bias (m) -> y (B, m), a (B, r).
    """
    x = rows(x)
    (tokens, n), (m, r) = x.shape, left.shape
    wide = x.dtype.itemsize == 2
    if r > (ON_CHIP if wide or fast else ON_CHIP_EXACT):
        a = product(x, V, fast=fast)
        c = a if middle is None else product(a, middle, fast=fast)
        return product(c, left.mT, bias, fast=fast), a
    y, a = x.new_empty(tokens, m), x.new_empty(tokens, r)
    V, left = V.contiguous(), left.contiguous()
    block = 128 if wide else 64
    wrap_triton(_fused_kernel)[(triton.cdiv(tokens, block),)](
        x, V, V if middle is None else middle.contiguous(), left, x if bias is None else bias,
        y, a, tokens, n, m, r, x.stride(0),
        MIDDLE=middle is not None, BIAS=bias is not None,
        BLOCK=block, N=tile_size(n, 64 if wide else 32), M=tile_size(m, 64 if wide else 32),
        R=tile_size(r, ON_CHIP), UPCAST=interpreted(), PRECISION="tf32" if fast else precision(x),
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return y, a
