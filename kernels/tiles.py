"""What every kernel needs: masked tiles of a stack of matrices, and how large a tile is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SLICES = 264  # programs that fill a large GPU twice; sums over rows are split until there are about so many


@triton.jit
def tile(A, rows, cols, height, width, stride):
    """A[rows, cols], zero outside of height × width.

    Shapes: rows (p), cols (q) -> (p, q).
    """
    inside = (rows[:, None] < height) & (cols[None, :] < width)
    return tl.load(A + rows[:, None].to(tl.int64) * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def put(A, value, rows, cols, height, width, stride):
    """A[rows, cols] = value, nothing outside of height × width."""
    inside = (rows[:, None] < height) & (cols[None, :] < width)
    at = A + rows[:, None].to(tl.int64) * stride + cols[None, :]
    tl.store(at, value.to(A.dtype.element_ty), mask=inside)


@triton.jit
def operand(value, A, UPCAST: tl.constexpr):
    """`value` rounded to the dtype of A, in which products are taken; `UPCAST` leaves the product itself to float32."""
    value = value.to(A.dtype.element_ty)
    if UPCAST:
        value = value.to(tl.float32)
    return value


@triton.jit
def add_product(
    total, A, C, rows, cols, height, inner, width, stride,
    K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + A[rows, :] C[:, cols], with a contiguous C (inner, width), in the dtype of C."""
    for k in range(0, inner, K):
        at = k + tl.arange(0, K)
        a = tile(A, rows, at, height, inner, stride).to(total.dtype)
        c = tile(C, at, cols, inner, width, width)
        total = tl.dot(a, c, total, input_precision=PRECISION)
    return total


@triton.jit
def tile_pair(width, TILE: tl.constexpr):
    """Where a program of a grid (pairs of tiles, slices of rows, matrices) works.

    Returns row and column of its pair of tiles in an output `width` wide, its slice and its matrix.
    """
    across = tl.cdiv(width, TILE)
    pair, part, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    return pair // across, pair % across, part.to(tl.int64), matrix.to(tl.int64)


def tile_size(size: int, largest: int = 64) -> int:
    """The smallest power of two that covers `size`, in [16, largest]: tensor cores need 16.

    By comparisons only, which a compiler can guard on where sizes are symbols.
    """
    return next((tile for tile in (16, 32, 64, 128) if size <= tile or tile == largest), largest)


def stacked(A: Tensor) -> Tensor:
    """A as a stack with unit column stride; a copy only where the columns are strided.

    Shapes: (rows, r) or (L, rows, r) -> (L, rows, r).
    """
    A = A if A.dim() == 3 else A[None]
    return A if A.stride(-1) == 1 or A.shape[-1] == 1 else A.contiguous()


def slices(rows: int, block: int, others: int) -> tuple[int, int]:
    """(count, rows of each) of the slices into which a sum over rows is split; `others` programs exist anyway.

    Every slice is whole blocks. The slices are summed afterwards in a fixed order: no atomics, the same bits each time.
    """
    blocks = triton.cdiv(rows, block)
    count = max(1, min(blocks, SLICES // max(others, 1)))
    each = triton.cdiv(blocks, count) * block
    return triton.cdiv(rows, each), each


def precision(A: Tensor) -> str:
    """How float32 tiles are multiplied: on tensor cores in three TF32 products (24 bits) where there are any."""
    if not A.is_cuda or torch.version.hip or torch.cuda.get_device_capability(A.device) < (8, 0):
        return "ieee"
    return "tf32x3"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which multiplies bfloat16 wrongly."""
    return not isinstance(tile, triton.runtime.JITFunction)
