"""The list of optimizers, and the small net that every check trains with each of them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import (
    AugmentedAdam,
    AugmentedHeavyBall,
    RiemannianAdam,
    RiemannianLion,
    RiemannianMuon,
    RiemannianSGD,
    RiemannianSignum,
)
from lowrank_geo.optim.filters import EMA, FSGDM, QHM

OPTIMIZERS = {
    "sgd": lambda groups: RiemannianSGD(groups, lr=0.05),
    "sgd, no momentum": lambda groups: RiemannianSGD(groups, lr=0.05, momentum=0.0),
    "sgd, nesterov, svd": lambda groups: RiemannianSGD(
        groups, lr=0.05, nesterov=True, retraction="svd"
    ),
    "sgd, product": lambda groups: RiemannianSGD(groups, lr=0.05, metric="product"),
    "sgd, splitting": lambda groups: RiemannianSGD(groups, lr=0.05, retraction="splitting"),
    "sgd, clipped": lambda groups: RiemannianSGD(groups, lr=0.5, filter=EMA(0.9), clip=0.1),
    "sgd, norm kept": lambda groups: RiemannianSGD(groups, lr=0.05, keep_norm=True),
    "qhm": lambda groups: RiemannianSGD(groups, lr=0.5, filter=QHM(0.7, 0.95)),
    "fsgdm": lambda groups: RiemannianSGD(groups, lr=0.05, filter=FSGDM(150, stages=30)),
    "signum": lambda groups: RiemannianSignum(groups, lr=0.003),
    "signsgd": lambda groups: RiemannianSignum(groups, lr=0.003, momentum=0.0),
    "lion": lambda groups: RiemannianLion(groups, lr=0.003),
    "rmsprop": lambda groups: RiemannianAdam(groups, lr=0.01, betas=(0.0, 0.95)),
    "qhadam": lambda groups: RiemannianAdam(groups, lr=0.01, betas=(0.9, 0.99), nus=(0.7, 0.9)),
    "adavar": lambda groups: RiemannianAdam(groups, lr=0.01, betas=(0.9, 0.95), gamma=0.5),
    "adam, scalar": lambda groups: RiemannianAdam(groups, lr=0.01, over="matrix"),
    "adam, core": lambda groups: RiemannianAdam(groups, lr=0.01, over="core"),
    "adam": lambda groups: RiemannianAdam(groups, lr=0.01),
    "adam, untied": lambda groups: RiemannianAdam(groups, lr=0.01, betas=(0.9, 0.99)),
    "adam, bounded": lambda groups: RiemannianAdam(groups, lr=0.03, max_rms=0.2),
    "adam, advance bounded": lambda groups: RiemannianAdam(groups, lr=0.3, max_advance=0.1),
    "adam, product": lambda groups: RiemannianAdam(groups, lr=0.01, metric="product"),
    "muon": lambda groups: RiemannianMuon(groups, lr=0.01),
    "muon, no nesterov": lambda groups: RiemannianMuon(groups, lr=0.01, nesterov=False),
    "muon, product": lambda groups: RiemannianMuon(groups, lr=0.01, metric="product"),
    "dlrt heavy ball": lambda groups: AugmentedHeavyBall(groups, lr=0.05, inner_steps=3),
    "dlrt heavy ball, every batch": lambda groups: AugmentedHeavyBall(
        groups, lr=0.1, tolerance=0.01, inner_steps=1, every_batch=True
    ),
    "dlrt adam": lambda groups: AugmentedAdam(groups, lr=0.01, inner_steps=3),
    "dlrt adam, corrected": lambda groups: AugmentedAdam(
        groups, lr=0.01, inner_steps=2, every_batch=True, second="mixed", age=True
    ),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
# Signs and entries of coordinates depend on the frames, and their docstrings say so.
COORDINATES = {
    *("sgd, clipped", "signum", "signsgd", "lion", "adam, core"),
    *("dlrt adam", "dlrt adam, corrected"),
}
every_invariant_optimizer = pytest.mark.parametrize(
    "make",
    [make for name, make in OPTIMIZERS.items() if name not in COORDINATES],
    ids=[name for name in OPTIMIZERS if name not in COORDINATES],
)


class Net(nn.Module):
    """Two layers of one shape, one of another, and every kind of dense parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LowRankLinear(8, 8, 3), LowRankLinear(8, 8, 3)
        self.third = LowRankLinear(8, 6, 2)
        self.norm, self.dense, self.lm_head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.unused = LowRankLinear(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return self.lm_head(torch.tanh(self.dense(self.norm(hidden))))


def backward(net, data, scale=1.0):
    loss = (net(data[0]) - data[1]).square().mean()
    net.zero_grad()
    (scale * loss).backward()
    return loss.item()


def run(net, optimizer, data, steps):
    losses = []
    for _ in range(steps):
        losses.append(backward(net, data))
        optimizer.step()
    return losses


def snapshot(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def states(optimizer):
    return [
        value.clone()
        for group in optimizer.param_groups
        for p in group["params"]
        for value in optimizer.state[p].values()
    ]


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor is read back to the host, as a CUDA graph or a device would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError(f"the step reads a tensor back: {func}")
        return func(*args, **(kwargs or {}))
