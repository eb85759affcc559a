"""models.shared_range: the same function as a stack of d-dimensional steps, in r / d of its memory."""

import pytest
import torch
from torch import nn

from lowrank_geo.live_memory import peak_bytes
from lowrank_geo.models import MomentumStack, SharedRangeStack


def linear(depth: int, d: int = 16, r: int = 2, dtype=torch.float64) -> SharedRangeStack:
    blocks = [nn.Sequential(nn.Linear(d, r, dtype=dtype), nn.Tanh()) for _ in range(depth)]
    return SharedRangeStack(blocks, nn.Linear(r, d, bias=False, dtype=dtype))


def whole(stack: SharedRangeStack) -> MomentumStack:
    """The same steps on all d entries."""
    blocks = [nn.Sequential(step.block, stack.expand) for step in stack.steps.blocks]
    return MomentumStack(blocks, stack.steps.gamma)


@pytest.mark.parametrize("mode", ["backprop", "reversible"])
def test_it_is_the_stack_of_the_expanded_blocks(mode):
    one, x = linear(30), torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    inner = [step.block for step in one.steps.blocks]
    stack = SharedRangeStack(inner, one.expand, 0.9, mode=mode, exact=False)
    wanted = [x, *whole(one).parameters()]
    grads = [torch.autograd.grad(net(x).square().sum(), wanted) for net in (stack, whole(one))]
    torch.testing.assert_close(stack(x), whole(one)(x), rtol=1e-12, atol=1e-12)
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_images_use_a_pointwise_convolution():
    blocks = [nn.Conv2d(6, 2, 3, padding=1) for _ in range(4)]
    stack = SharedRangeStack(blocks, nn.Conv2d(2, 6, 1, bias=False))
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(stack(x), whole(stack)(x), rtol=1e-5, atol=1e-5)


def test_exact_reversible_gradients_are_those_of_backprop():
    one = linear(400)
    inner = [step.block for step in one.steps.blocks]
    x, grads = torch.randn(5, 16, dtype=torch.float64), []
    for mode in ("reversible", "backprop"):
        stack = SharedRangeStack(inner, one.expand, 0.5, mode=mode, exact=True)
        grads.append(torch.autograd.grad(stack(x).square().sum(), list(stack.parameters())))
    for found, wanted in zip(*grads, strict=True):
        assert (found - wanted).norm() < 1e-10 * wanted.norm()


class Lanes(nn.Module):
    """A block without parameters from d entries to the first r of them."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.r = r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., : self.r].sin()


def test_what_grows_with_depth_is_r_over_d_of_the_whole_stack():
    d, r, x = 64, 8, torch.randn(500, 64)

    def growth(build) -> int:
        def peak(depth: int) -> int:
            stack = build(depth)
            start = x.clone().requires_grad_()
            return peak_bytes(lambda: stack(start).sum().backward())

        return peak(240) - peak(10)

    expand = nn.Linear(r, d, bias=False)
    expand.weight.requires_grad_(False)
    shared = growth(
        lambda depth: SharedRangeStack([Lanes(r)] * depth, expand, 0.5, mode="reversible")
    )
    entire = growth(
        lambda depth: MomentumStack(
            [nn.Sequential(Lanes(r), expand)] * depth, 0.5, mode="reversible"
        )
    )
    remainders = 8 * x.numel() * 5  # 240 / 47
    checksums = 240 * 128
    assert remainders <= entire <= remainders + checksums
    assert shared <= remainders * r / d + checksums


def test_refuses_an_expand_with_bias_and_blocks_of_another_size():
    with pytest.raises(ValueError, match="expand without bias"):
        SharedRangeStack([nn.Linear(16, 2)], nn.Linear(2, 16))
    with pytest.raises(ValueError, match=r"keep the shape \(3, 2\), got \(3, 4\)"):
        SharedRangeStack([nn.Linear(16, 4)], nn.Linear(2, 16, bias=False))(torch.zeros(3, 16))
