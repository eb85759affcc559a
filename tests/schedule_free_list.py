"""Schedule-free optimizers of the small net that every optimizer trains."""

import pytest
import torch

from lowrank_geo.optim import (
    Polyak,
    RiemannianAdam,
    RiemannianMuon,
    RiemannianSGD,
    ScheduleFree,
    param_groups,
)

INNER = {
    "sgd": lambda groups: RiemannianSGD(groups, momentum=0.0),
    "adam": lambda groups: RiemannianAdam(groups, betas=(0.0, 0.99)),
    "muon": lambda groups: RiemannianMuon(groups),
}
FORMS = {
    "collapsed": dict(),
    "orthographic": dict(average="orthographic", weights="schedulet"),
    "branches": dict(gradient_at="branches"),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# Those that need the loss of every step, too.
WITH_LOSS = {
    **FORMS,
    "polyak": dict(step_size=Polyak(max_lr="lr")),
    "polyak, branches": dict(step_size=Polyak(max_lr=0.1), gradient_at="branches"),
}
every_form_with_a_loss = pytest.mark.parametrize("form", WITH_LOSS.values(), ids=WITH_LOSS)


class Regression:
    """A convex loss of 60 samples with a known minimiser: absolute errors, 0 there, or squares of noisy targets."""

    def __init__(self, kind, samples=60, size=12):
        self.A, self.kind = torch.randn(samples, size), kind
        self.solution = torch.randn(size)
        self.targets = self.A @ self.solution
        if kind == "squares":
            self.targets += torch.randn(samples)
            self.solution = torch.linalg.lstsq(self.A, self.targets).solution

    def __call__(self, w, rows=slice(None)):
        errors = self.A[rows] @ w - self.targets[rows]
        return errors.abs().mean() if self.kind == "absolute" else errors.square().mean() / 2

    def gap(self, w):
        return self(w) - self(self.solution)


every_regression = pytest.mark.parametrize("kind", ["absolute", "squares"])


def build(net, form=FORMS["collapsed"], inner="adam", **groups):
    groups = {"lr": 0.02, "euclidean_lr": 0.02, "weight_decay": 0.1, **groups}
    optimizer = ScheduleFree(INNER[inner](param_groups(net, **groups)), model=net, **form)
    optimizer.train()
    return optimizer


def train(net, optimizer, data, steps):
    optimizer.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(data[0]) - data[1]).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return loss.item()


def error(net, data):
    with torch.no_grad():
        return (net(data[0]) - data[1]).square().mean().item()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
