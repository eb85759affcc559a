"""A layer between two points: its gradients against the dense mixture, and what training with it gives."""

import pytest
import torch
from oracles import dense, tangent_projection
from tiny_models import relative
from torch import nn

from lowrank_geo import param_groups
from lowrank_geo.branches import Branch
from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.geometry import Point
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import RiemannianSGD, ScheduleFree

LAYERS = {
    "linear": (lambda: LowRankLinear(7, 9, 3, dtype=torch.float64), (5, 7)),
    "tokens": (lambda: LowRankLinear(7, 9, 3, dtype=torch.float64, bias=False), (2, 5, 7)),
    "convolution": (
        lambda: LowRankConv2d(3, 8, 3, rank=4, padding=1, stride=2, dtype=torch.float64),
        (2, 3, 6, 6),
    ),
}


@pytest.mark.parametrize("beta", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_branches_have_the_dense_gradient_between_the_points(make, shape, beta, point):
    """P_{T_z} ∂L/∂W_y, ⟨∂L/∂W_y, W_x − W_z⟩ and ∂L/∂x against the dense layer at W_y; worst of 60 draws 4e-16."""
    layer = make()
    param_groups(layer)
    z = Point(*(p.detach().clone() for p in layer.point))
    second = point(*z.U.shape[:1], z.V.shape[0], layer.rank)
    weight = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    layer.second = Branch(second, weight)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = layer(inputs)
    pull = torch.randn_like(out)
    (out * pull).sum().backward()
    W = ((1 - beta) * dense(z) + beta * dense(second)).requires_grad_()
    twin = inputs.detach().clone().requires_grad_()
    if isinstance(layer, LowRankConv2d):
        ours = nn.functional.conv2d(twin, W.reshape(8, 3, 3, 3), layer.bias, stride=2, padding=1)
    else:
        ours = nn.functional.linear(twin, W, layer.bias)
    (ours * pull).sum().backward()
    assert relative(out, ours) < 4e-15 and relative(inputs.grad, twin.grad) < 4e-15
    Up, M, Vp = (p.grad for p in layer.point)
    found = (z.U @ M + Up) @ z.V.mT + z.U @ Vp.mT
    assert relative(found, tangent_projection(z, W.grad)) < 4e-15
    towards = (W.grad * (dense(second) - dense(z))).sum()
    assert abs(weight.grad - towards) < 4e-15 * W.grad.norm() * dense(second).norm()
    assert relative(layer.matrix(), W) < 4e-15


def test_averages_beat_the_iterates_in_noisy_completion(point):
    """Entries of a rank-3 matrix, 30 % at a time and with noise: x ends nearer to it than z, in both forms."""
    target = dense(point(20, 15, 3, core=3.0)).float()
    for form in ("collapsed", "branches"):
        start = target + 0.3 * torch.randn(20, 15)
        net = nn.Sequential(LowRankLinear.from_weight(start, None, 3))
        inner = RiemannianSGD(param_groups(net), lr=0.4, momentum=0)
        optimizer = ScheduleFree(inner, gradient_at=form, model=net)
        optimizer.train()
        for _ in range(200):
            optimizer.zero_grad()
            noisy = target + 0.3 * torch.randn_like(target)
            seen = (torch.rand_like(target) < 0.3).float()
            (0.5 * seen * (net[0].matrix() - noisy).square()).sum().backward()
            optimizer.step()
        optimizer.eval()
        z = dense(Point(*(optimizer.state[p]["z"] for p in net[0].point))).float()
        x = net[0].matrix().detach()
        assert relative(x, target) < 0.5 * relative(z, target), form
