"""What FlopCounterMode reports for a layer is the formula of docs/mathematics.md."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.layers import LowRankLinear

# tokens, m, n, r: both sides of the two foldings, r = 1, r = n, r = m, no token.
SHAPES = [
    (3, 7, 5, 1),
    (40, 24, 18, 8),
    (20, 24, 18, 8),
    (5, 33, 8, 8),
    (50, 6, 40, 6),
    (0, 7, 5, 2),
]


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def step(layer, x):
    layer(x).sum().backward()


def tangent(layer):
    layer.gradient = "tangent"
    return layer


@pytest.mark.parametrize("tokens, m, n, r", SHAPES)
def test_linear_forward_and_backward_cost_the_formula(tokens, m, n, r):
    layer = tangent(LowRankLinear(n, m, r, bias=False))
    x = torch.zeros(tokens, n, requires_grad=True)
    forward = tokens * r * (m + n) + r * r * min(tokens, m)
    gauge = min(m, n) + m + n
    backward = 2 * tokens * r * (m + n) + r * r * (min(tokens, n) + gauge)
    assert count(lambda: layer(x)) == 2 * forward
    assert count(lambda: step(layer, x)) == 2 * (forward + backward)


def test_a_first_layer_does_not_pay_for_the_gradient_of_its_input():
    layer = tangent(LowRankLinear(18, 24, 8, bias=False))
    x = torch.zeros(40, 18)
    saved = 2 * (40 * 8 * 18 + 8 * 8 * 18)  # b S Vᵀ, folded
    with_x = count(lambda: step(layer, x.clone().requires_grad_()))
    assert count(lambda: step(layer, x)) == with_x - saved


@pytest.mark.parametrize(
    "layer, x",
    [
        (LowRankLinear(18, 24, 8), torch.zeros(40, 18)),
        (LowRankConv2d(4, 6, 3, 3, padding=1), torch.zeros(2, 4, 7, 8)),
    ],
    ids=["linear", "convolution"],
)
def test_tangent_training_costs_the_factors_forward_and_less_than_its_backward(layer, x):
    x.requires_grad_()
    factors = count(lambda: layer(x)), count(lambda: step(layer, x))
    tangent(layer)
    found = count(lambda: layer(x)), count(lambda: step(layer, x))
    assert 0 < found[0] == factors[0]
    # Two passes of the forward's size backward, and r×r products.
    assert 3 * found[0] * 0.8 < found[1] < factors[1] * 1.2
