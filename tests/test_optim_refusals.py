"""What the optimizers refuse, each in one sentence."""

import math

import pytest
import torch
from optimizer_list import Net
from torch import nn

from lowrank_geo import guard
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD, param_groups


@pytest.fixture
def net():
    return Net()


BAD = {
    "a negative lr": (lambda g: RiemannianSGD(g, lr=-1.0), r"lr needs .* >= 0, got -1\.0"),
    "a NaN lr": (lambda g: RiemannianMuon(g, lr=math.nan), "lr needs to be a finite number"),
    "a momentum of 1": (lambda g: RiemannianSGD(g, momentum=1.0), r"momentum needs .* got 1\.0"),
    "a beta of 1": (
        lambda g: RiemannianAdam(g, betas=(0.9, 1.0)),
        r"betas need .* got \(0\.9, 1\.0\)",
    ),
    "an unknown metric": (
        lambda g: RiemannianSGD(g, metric="flat"),
        "'embedded' or 'product', got 'flat'",
    ),
    "an unknown retraction": (lambda g: RiemannianSGD(g, retraction="exp"), "got 'exp'"),
    "a negative weight decay": (
        lambda g: RiemannianSGD(g, weight_decay=-0.1),
        "weight_decay needs",
    ),
    "a negative scale": (lambda g: RiemannianMuon(g, rotation=-1.0), "rotation needs to be >= 0"),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD)
def test_refuses(make, sentence, net):
    with pytest.raises(ValueError, match=sentence):
        make(param_groups(net))


def test_refuses_a_split_triple(net):
    triples = param_groups(net)[0]["params"]
    with pytest.raises(ValueError, match="whole triples"):
        RiemannianSGD([{"params": triples[:4], "geometry": "fixed_rank"}])
    with pytest.raises(ValueError, match="keep U, S, V together"):
        RiemannianSGD(net.parameters())


def test_refuses_factors_in_the_wrong_order(net):
    U, S, V = param_groups(net.third)[0]["params"]
    with pytest.raises(ValueError, match=r"U \(m, r\), S \(r, r\), V \(n, r\)"):
        RiemannianSGD([{"params": [S, U, V], "geometry": "fixed_rank"}])


def test_refuses_frames_that_are_not_orthonormal(net):
    groups = param_groups(net)
    net.first.U.data.mul_(2)
    with pytest.raises(ValueError, match="orthonormal columns in U"):
        RiemannianSGD(groups)


def test_refuses_layers_in_factors_mode(net):
    points = list(net.first.point)
    with pytest.raises(ValueError, match="gradient='tangent'"):
        RiemannianSGD([{"params": points, "geometry": "fixed_rank"}])
    optimizer = RiemannianSGD(param_groups(net))
    net.first.gradient = "factors"
    net.first(torch.randn(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="set to 'factors' after"):
        optimizer.step()


def test_a_refused_group_is_not_added(net):
    optimizer = RiemannianSGD(param_groups(net))
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="geometry out of"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "geometry": "sphere"})
    with pytest.raises(ValueError, match="lr needs"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0})
    assert len(optimizer.param_groups) == count


def test_refuses_a_state_of_other_shapes(net):
    saved = RiemannianSGD(param_groups(net)).state_dict()
    other = Net()
    other.third = LowRankLinear(8, 6, 3)
    with pytest.raises(ValueError, match=r"momentum of shape \(6, 3\), got \(6, 2\)"):
        RiemannianSGD(param_groups(other)).load_state_dict(saved)


def test_refuses_sparse_gradients():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = RiemannianSGD(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="got a sparse one"):
        optimizer.step()


def test_marks_do_not_outlive_the_parameters(net):
    param_groups(net)
    assert guard.is_marked(net.first.U)
    net.first.gradient = "factors"
    assert not guard.is_marked(net.first.U)
