"""flops: what FlopCounterMode reports for an operator is what its matrix products and convolutions cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lowrank_geo.flops  # noqa: F401  registers the formulas
from lowrank_geo.convolution import tangent_conv2d, tangent_conv2d_backward
from lowrank_geo.functional import lowrank_linear, tangent_linear, tangent_linear_backward
from lowrank_geo.layers import LowRankConv2d, LowRankLinear

# tokens, m, n, r: both sides of the two foldings, r = 1, r = n, r = m, no token.
SHAPES = [
    (3, 7, 5, 1),
    (40, 24, 18, 8),
    (20, 24, 18, 8),
    (5, 33, 8, 8),
    (50, 6, 40, 6),
    (0, 7, 5, 2),
]
# kernel, stride, dilation, images.
WINDOWS = [((3, 3), (1, 1), (1, 1), 2), ((1, 1), (1, 1), (1, 1), 1), ((3, 2), (2, 1), (1, 2), 3)]
PRECISIONS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
precisions = pytest.mark.parametrize("kept, used", PRECISIONS, ids=["float32", "bfloat16 x"])


def count(call):
    """Operations by name, as the counter lists them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op): total for op, total in counter.get_flop_counts()["Global"].items()}


def assert_counts_its_own_products(operator, inputs):
    """The formula equals torch's count of what the operator runs inside."""
    inside = sum(count(lambda: operator._init_fn(*inputs)).values())
    assert count(lambda: operator(*inputs)) == {f"lowrank_geo.{operator._name}": inside}


def linear_problem(point, tokens, m, n, r, kept, used):
    """g (tokens, m), x (tokens, n), a (tokens, r) and the factors."""
    g, x, a = (torch.randn(tokens, width, dtype=used) for width in (m, n, r))
    return g, x, a, point(m, n, r, kept)


@precisions
@pytest.mark.parametrize("tokens, m, n, r", SHAPES)
def test_linear_counts_are_those_of_its_products(point, tokens, m, n, r, kept, used):
    g, x, a, p = linear_problem(point, tokens, m, n, r, kept, used)
    assert_counts_its_own_products(tangent_linear, (x, *p))
    assert_counts_its_own_products(tangent_linear_backward, (g, x, a, *p))


@precisions
@pytest.mark.parametrize("kernel, stride, dilation, images", WINDOWS)
def test_convolution_counts_are_those_of_its_products(
    point, kernel, stride, dilation, images, kept, used
):
    p = point(6, 4 * kernel[0] * kernel[1], 3, kept)
    window = (list(kernel), list(stride), list(dilation))
    x = torch.randn(images, 4, 7, 8, dtype=used)
    y, a = tangent_conv2d(x, *p, *window)
    assert_counts_its_own_products(tangent_conv2d, (x, *p, *window))
    assert_counts_its_own_products(tangent_conv2d_backward, (y, x, a, *p, *window))


def test_linear_counts_are_the_formula_by_hand(point):
    # 2·(40·8·(24 + 18) + 24·8²) forward; twice the first term, with min(40, 18) + 2·24 + 18 rows of 8², backward.
    g, x, a, p = linear_problem(point, 40, 24, 18, 8, torch.float32, torch.float32)
    assert count(lambda: tangent_linear(x, *p)) == {"lowrank_geo.tangent_linear": 29952}
    backward = {"lowrank_geo.tangent_linear_backward": 64512}
    assert count(lambda: tangent_linear_backward(g, x, a, *p)) == backward


def step(layer, x):
    layer(x).sum().backward()


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
    factors = sum(count(lambda: layer(x)).values()), sum(count(lambda: step(layer, x)).values())
    layer.gradient = "tangent"
    tangent = sum(count(lambda: layer(x)).values()), sum(count(lambda: step(layer, x)).values())
    assert 0 < tangent[0] == factors[0]
    # Two passes of the forward's size backward, and r×r products.
    assert 3 * tangent[0] * 0.8 < tangent[1] < factors[1] * 1.2


def test_counts_include_every_use_in_a_model(point):
    _, x, _, p = linear_problem(point, 9, 7, 5, 2, torch.float32, torch.float32)

    def call():
        return lowrank_linear(x, *p, gradient="tangent")

    once, twice = count(call), count(lambda: (call(), call()))
    assert twice == {name: 2 * total for name, total in once.items()}
