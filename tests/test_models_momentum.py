"""models.momentum: inversion bit for bit, the gradients of backpropagation, state put back, refusals."""

import copy
import gc
import math

import pytest
import torch
from torch import Tensor, nn

import lowrank_geo
from lowrank_geo.models import MomentumStack, fixed_point

DEPTHS = [(0.5, 1000), (0.9, 1000), (0.99, 1000), (0.5, 40), (0.9, 400)]


def tanh_blocks(depth: int, width: int = 8, dtype=torch.float64) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Tanh()) for _ in range(depth)]


def gradients(stack: MomentumStack, x: Tensor, *arguments) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y, v = stack.flow(x, torch.zeros_like(x), *arguments)
    wanted = [x, *stack.parameters()]
    return [y, *torch.autograd.grad((y * y.detach().cos() + v).sum(), wanted)]


def twins(blocks, gamma, x, *arguments) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of both modes, from the same bits of the generator."""
    found = []
    for mode in ("reversible", "backprop"):
        torch.manual_seed(1)
        stack = MomentumStack(copy.deepcopy(blocks), gamma, mode=mode, exact=True)
        found.append(gradients(stack, x, *arguments))
    return found[0], found[1]


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99, 2**-16, 1 - 2**-16])
def test_a_thousand_steps_are_undone_bit_for_bit(gamma):
    n = fixed_point.numerator(gamma)
    begin = fixed_point.start(torch.randn(50), torch.randn(50))
    pushes = torch.randint(-(2**34), 2**34, (1000, 50))
    state, kept = begin, []
    for index, push in enumerate(pushes):
        state, full = fixed_point.renew(state, index, n)
        kept += [] if full is None else [full]
        state = fixed_point.advance(state, push, n)
        assert 0 <= state.lost.min() and state.lost.max() < 2**47
    for index, push in reversed(list(enumerate(pushes))):
        state = fixed_point.retreat(state, push, n)
        if fixed_point.begins_remainder(index, n):
            state = state._replace(lost=kept.pop())
    assert all(torch.equal(a, b) for a, b in zip(state, begin, strict=True)) and not kept


@pytest.mark.parametrize("gamma, depth", DEPTHS)
def test_reversible_gradients_are_those_of_backprop_on_the_same_forward(gamma, depth):
    one, two = twins(tanh_blocks(depth), gamma, torch.randn(4, 8, dtype=torch.float64))
    assert torch.equal(one[0], two[0])
    assert max((a - b).norm() / b.norm() for a, b in zip(one, two, strict=True)) < 1e-10


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_float32_gradients_agree_to_rounding(gamma):
    one, two = twins(tanh_blocks(100, dtype=torch.float32), gamma, torch.randn(4, 8))
    assert max((a - b).norm() / b.norm() for a, b in zip(one, two, strict=True)) < 1e-5


def test_plain_backprop_is_the_equation():
    blocks, x, v = tanh_blocks(5), torch.randn(3, 8, dtype=torch.float64), torch.tensor(0.0)
    found = MomentumStack(blocks, 0.7)(x)
    for block in blocks:
        v = 0.7 * v + (1 - 0.7) * block(x)
        x = x + v
    assert torch.equal(found, x)


def test_gamma_zero_is_the_residual_network():
    blocks, x = tanh_blocks(3), torch.randn(3, 8, dtype=torch.float64)
    found = MomentumStack(blocks, 0)(x)
    for block in blocks:
        x = x + block(x)
    torch.testing.assert_close(found, x, rtol=0, atol=0)


def test_dropout_and_batch_norm_are_as_in_one_pass():
    blocks = [
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.3))
        for _ in range(6)
    ]
    stacks = []
    for mode in ("reversible", "backprop"):
        torch.manual_seed(1)
        stack = MomentumStack(copy.deepcopy(blocks), 0.9, mode=mode, exact=True)
        stacks.append((gradients(stack, torch.ones(2, 3, 5, 5).cumsum(3)), stack, torch.rand(2)))
    (one, a, after), (two, b, wanted) = stacks
    for found, expected in zip(one, two, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(s, t) for s, t in zip(a.buffers(), b.buffers(), strict=True))
    assert torch.equal(after, wanted)  # backward leaves the generator as it was


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor, gate: Tensor, power: int) -> Tensor:
        return self.linear(x).tanh() * gate**power


def test_extra_arguments_and_shared_blocks_get_their_gradients():
    block, grads = Gated(), []
    for mode in ("reversible", "backprop"):
        gate = torch.arange(1.0, 5.0, dtype=torch.float64, requires_grad=True)
        stack = MomentumStack([block] * 7, 0.9, mode=mode, exact=True)
        y = stack(torch.ones(2, 4, dtype=torch.float64), gate * 0.3, 2)
        grads.append(torch.autograd.grad(y.square().sum(), [gate, *block.parameters()]))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_autocast_is_the_same_in_backward():
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        stack = MomentumStack(tanh_blocks(5, dtype=torch.float32), 0.9, mode="reversible")
        loss = stack(x).square().sum()
    loss.backward()  # other bits would be refused
    assert stack.blocks[0][0].weight.grad.isfinite().all()


def test_low_rank_convolutions_are_reversible():
    net = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
    blocks = list(lowrank_geo.convert(net, rank=2))
    one, two = twins(blocks, 0.9, torch.randn(2, 8, 4, 4))
    for found, wanted in zip(one, two, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def live_bytes() -> int:
    seen = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, nn.Parameter):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


class Watch(nn.Module):
    peak = 0

    def forward(self, x: Tensor) -> Tensor:
        Watch.peak = max(Watch.peak, live_bytes())
        return x.sin()


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_peak_live_bytes_are_constant_but_for_the_lost_bits(gamma):
    peaks, x = {}, torch.randn(20000, requires_grad=True)
    for depth in (10, 150):
        gc.collect()
        Watch.peak, before = 0, live_bytes()
        MomentumStack([Watch()] * depth, gamma, mode="reversible")(x).sum().backward()
        peaks[depth] = Watch.peak - before
    more = 8 * x.numel() * math.ceil(150 * math.log2(1 / gamma) / 44)
    assert peaks[150] <= peaks[10] + more + 8192


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e12])
def test_values_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="finite values below"):
        MomentumStack([nn.Identity()], mode="reversible")(torch.tensor([1.0, bad]))


def test_growth_beyond_fixed_point_is_refused_and_never_wrapped():
    with pytest.raises(ValueError, match="finite values below"):
        MomentumStack([nn.Identity()] * 200, 0.5, mode="reversible")(torch.ones(3))


def test_a_block_changed_before_backward_is_detected():
    stack = MomentumStack(tanh_blocks(3), mode="reversible")
    y = stack(torch.randn(2, 8, dtype=torch.float64)).sum()
    stack.blocks[1][0].weight.data.mul_(1.01)
    with pytest.raises(RuntimeError, match="block 1 to give the same bits"):
        y.backward()


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_refuses_gamma_outside_its_range(gamma):
    with pytest.raises(ValueError, match="0 <= gamma < 1"):
        MomentumStack([nn.Identity()], gamma)


def test_refuses_what_cannot_be_inverted():
    with pytest.raises(ValueError, match="exact arithmetic, got 0"):
        MomentumStack([nn.Identity()], 0, mode="reversible")
    with pytest.raises(ValueError, match="keep the shape"):
        MomentumStack([nn.Linear(4, 3)], mode="reversible")(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="leave exact out"):
        MomentumStack([nn.Identity()], mode="reversible", exact=False)
