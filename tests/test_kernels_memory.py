"""What kernels read and write: nothing outside of their tensors, all of their outputs, any stride, any offset."""

import numpy
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, SHAPES, error, layer, mapped, outputs, stacks
from torch import Tensor

from lowrank_geo import operators
from lowrank_geo.kernels.gram import gram
from lowrank_geo.kernels.lowrank_linear import lowrank_linear
from lowrank_geo.kernels.spectral import apply
from lowrank_geo.kernels.transport import transport_write

BAND = 128  # elements on either side
MARK = -12345.0
STACKED = ("tangent", "transport", "retract", "polar", "spectral", "damped_factor", "apply")
LAYER = ("lowrank_linear", "lowrank_linear_backward")


def banded(shape, dtype, fill) -> tuple[Tensor, Tensor]:
    """(buffer, view of its middle): the middle holds `fill`, the bands MARK."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 2 * BAND,), MARK, dtype=dtype, device=DEVICE)
    buffer[BAND : BAND + size] = fill
    return buffer, buffer[BAND : BAND + size].view(shape)


@pytest.fixture
def allocations(monkeypatch):
    """Every `new_empty` gets NaN in its middle and marks around it."""
    made = []

    original = torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return original(self, *shape, dtype=dtype, device=device)
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        buffer, view = banded(shape, dtype or self.dtype, float("nan"))
        made.append((buffer, view))
        return view

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield made


def surrounded(x: Tensor) -> Tensor:
    """x with marks around it in memory: a sum that reads past the end shows."""
    return banded(x.shape, x.dtype, x.flatten())[1]


def intact(allocations):
    for buffer, view in allocations:
        assert (buffer[:BAND] == MARK).all() and (buffer[BAND + view.numel() :] == MARK).all()
        assert not view.isnan().any()


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_stacks_are_written_in_full_and_nothing_else_is(name, shape, allocations):
    given = stacks(*shape)[name]
    plain = outputs(getattr(operators, name)(*given))
    allocations.clear()
    found = outputs(getattr(operators, name)(*mapped(given, surrounded)))
    intact(allocations)
    assert allocations
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (50, 37, 29, 5), (33, 140, 150, 130)], ids=str)
@pytest.mark.parametrize("name", LAYER)
def test_layers_are_written_in_full_and_nothing_else_is(name, shape, dtype, allocations):
    found = getattr(operators, name)(*mapped(layer(*shape, dtype)[name], surrounded))
    intact(allocations)
    assert len(allocations) >= 2 and all(x.isfinite().all() for x in outputs(found))


def test_a_kernel_that_forgets_its_mask_is_caught(allocations):
    @triton.jit
    def careless(out, BLOCK: tl.constexpr):
        tl.store(out + tl.arange(0, BLOCK), 1.0)

    out = torch.zeros((), device=DEVICE).new_empty(5)
    careless[(1,)](out, BLOCK=8)
    with pytest.raises(AssertionError):
        intact(allocations)


def in_columns(x: Tensor) -> Tensor:
    """The same numbers with the strides of the transposed matrix."""
    return x.mT.contiguous().mT


def in_wider_rows(x: Tensor) -> Tensor:
    """The same numbers as a slice of a wider tensor full of NaN."""
    if x.dim() < 2:
        return x
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


@pytest.mark.parametrize("change", [in_columns, in_wider_rows])
@pytest.mark.parametrize("name", STACKED)
def test_stacks_of_any_strides_give_the_same_bits(name, change):
    given = stacks(2, 40, 37, 5)[name]
    plain = outputs(getattr(operators, name)(*given))
    strided = mapped(given, lambda x: change(x) if x.dim() == 3 else x)
    found = outputs(getattr(operators, name)(*strided))
    assert all(error(x, y) < 1e-6 for x, y in zip(found, plain, strict=True))


@pytest.mark.parametrize("change", [in_columns, in_wider_rows])
@pytest.mark.parametrize("name", LAYER)
def test_layers_of_any_strides_give_the_same_numbers(name, change):
    given = layer(20, 37, 29, 5, torch.float32)[name]
    plain = outputs(getattr(operators, name)(*given))
    found = getattr(operators, name)(*mapped(given, lambda x: change(x) if x.dim() > 1 else x))
    assert all(error(x, y) < 1e-5 for x, y in zip(outputs(found), plain, strict=True))


@pytest.fixture
def address_space(monkeypatch):
    """far(shape, strides, dtype): a tensor whose pages exist only where they are touched."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    if DEVICE == "cpu":
        # After a launch the interpreter copies every storage onto itself, which would touch every page.
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)

    def far(shape, strides, dtype):
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        assert last > 2**31, "an offset in 32 bits would not overflow"
        try:
            memory = torch.empty(last + 1, dtype=dtype, device=DEVICE)
        except RuntimeError:
            pytest.skip("needs 9 GB of address space")
        return memory.as_strided(shape, strides)

    yield far


STEP = 2**30 + 64  # fits into 32 bits itself; three of them do not


def test_offsets_of_rows_do_not_overflow(address_space):
    n, m, r = 24, 20, 5
    x = address_space((4, n), (STEP, 1), torch.bfloat16)
    x.copy_(torch.randn(4, n))
    V, left = torch.randn(n, r, device=DEVICE), torch.randn(m, r, device=DEVICE)
    near = x.clone()
    found, wanted = lowrank_linear(x, V, None, left), lowrank_linear(near, V, None, left)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(gram(x[None], x[None]), gram(near[None], near[None]))


def test_offsets_of_matrices_do_not_overflow(address_space):
    L, rows, r = 3, 19, 6
    U = address_space((L, rows, r), (STEP, r, 1), torch.float32)
    U.copy_(torch.randn(L, rows, r))
    near = U.clone()
    C = torch.randn(L, r, r, device=DEVICE)
    assert torch.equal(gram(U, U), gram(near, near))
    assert torch.equal(apply(U, C), apply(near, C))
    found = transport_write(U, near, U, C, C, C)
    assert torch.equal(found, transport_write(near, near, near, C, C, C))
    assert error(gram(U, U), near.mT @ near) < 1e-5


def test_an_offset_in_32_bits_would_have_overflowed():
    @triton.jit
    def offsets(out, step):
        tl.store(out, (tl.full((), 3, tl.int32) * step).to(tl.int64))
        tl.store(out + 1, tl.full((), 3, tl.int32).to(tl.int64) * step)

    out = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with numpy.errstate(over="ignore"):
        offsets[(1,)](out, STEP)
    short, long = out.tolist()
    assert long == 3 * STEP and short != long
