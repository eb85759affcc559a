"""What the optimizers refuse, each in one sentence."""

import copy
import math
import pickle

import pytest
import torch
from optimizer_list import Net
from torch import nn

from lowrank_geo import guard
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import (
    AugmentedAdam,
    RiemannianAdam,
    RiemannianLion,
    RiemannianMuon,
    RiemannianSGD,
    ScheduleFree,
    param_groups,
)
from lowrank_geo.optim.filters import EMA


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
    "a beta alone": (
        lambda g: RiemannianAdam(g, betas=0.9),
        "betas need to be two numbers, got 0.9",
    ),
    "nus alone": (
        lambda g: RiemannianAdam(g, nus=(1.0,)),
        r"nus need to be two numbers, got \(1.0,\)",
    ),
    "an lr in quotes": (lambda g: RiemannianSGD(g, lr="0.1"), "lr needs to be a number, got '0.1'"),
    "an lr of None": (lambda g: RiemannianSGD(g, lr=None), "lr needs to be a number, got None"),
    "several lrs": (
        lambda g: RiemannianSGD(g, lr=torch.ones(2)),
        r"lr needs to be one number, got a tensor of shape \(2,\)",
    ),
    "an eps of None": (lambda g: RiemannianAdam(g, eps=None), "eps needs to be a number, got None"),
    "betas of a group": (
        lambda g: RiemannianLion([{**x, "betas": (0.9, 0)} for x in g]),
        r"betas\[1\] > 0, got \(0.9, 0\)",
    ),
    "a mistyped key": (
        lambda g: RiemannianSGD([{**x, "weight_decya": 0.1} for x in g]),
        "got 'weight_decya'; did you mean 'weight_decay'",
    ),
    "a clip in quotes": (
        lambda g: RiemannianSGD(g, clip="1"),
        "clip needs to be a number, got '1'",
    ),
    "a nu of Adam above 1": (
        lambda g: RiemannianAdam(g, nus=(1.5, 1.0)),
        r"nus need to be two numbers in \[0, 1\], got \(1\.5, 1\.0\)",
    ),
    "nus of a group": (
        lambda g: RiemannianAdam([{**x, "nus": (0.5, -1.0)} for x in g]),
        r"nus need .* got \(0\.5, -1\.0\)",
    ),
    "an infinite gamma": (lambda g: RiemannianAdam(g, gamma=math.inf), "gamma >= 0, got inf"),
    "a gamma in quotes": (lambda g: RiemannianAdam(g, gamma="x"), "gamma needs to be a number"),
    "a momentum in quotes": (
        lambda g: RiemannianMuon(g, momentum="0.95"),
        "momentum needs to be a number, got '0.95'",
    ),
    "a scale of None": (lambda g: RiemannianMuon(g, scale=None), "scale needs to be a number"),
    "a scale of a group": (
        lambda g: RiemannianMuon([{**x, "scale": -1.0} for x in g]),
        r"scale needs to be >= 0, got -1\.0",
    ),
    "an eps of the core in quotes": (
        lambda g: AugmentedAdam(g, eps="x"),
        "eps needs to be a number",
    ),
    "weights in a list": (
        lambda g: ScheduleFree(RiemannianSGD(g), weights=[1, 2]),
        r"weights need .* got \[1, 2\]",
    ),
    "an average in a list": (
        lambda g: ScheduleFree(RiemannianSGD(g), average=["truncate"]),
        r"average needs to be one of .*, got \['truncate'\]",
    ),
    "branches of no model": (
        lambda g: ScheduleFree(RiemannianSGD(g), gradient_at="branches", model="gpt"),
        "needs the model, got 'gpt'",
    ),
    "a model as parameters": (
        lambda g: RiemannianSGD(nn.Linear(2, 2)),
        r"needs parameter groups, got the module Linear; pass lowrank_geo.param_groups\(model\)",
    ),
    "parameters as a group": (
        lambda g: RiemannianSGD(g).add_param_group([nn.Parameter(torch.ones(2))]),
        "a dict with 'params', got list",
    ),
    "a group of no parameters": (
        lambda g: RiemannianSGD(g).add_param_group({"geometry": "euclidean"}),
        r"a dict with 'params', got \['geometry'\]",
    ),
    "names that are not in a tuple": (
        lambda g: param_groups(Net(), dense="lm_head"),
        r"dense needs a tuple of names, got 'lm_head'; pass \('lm_head',\)",
    ),
    "a filter of a group": (
        lambda g: RiemannianSGD([{**x, "filter": EMA(0.9)} for x in g]),
        "got 'filter', which holds for all groups; pass filter=… to the optimizer",
    ),
    "another rate of a group": (
        lambda g: RiemannianMuon([{**x, "euclidean_lr": 0.1} for x in g]),
        "got 'euclidean_lr', which holds for all groups",
    ),
    "momentum beside a filter": (
        lambda g: RiemannianSGD(g, filter=EMA(0.9), nesterov=True),
        r"a filter or a momentum, got EMA\(.*nesterov=True; leave these out",
    ),
    "a filter that is not made": (
        lambda g: RiemannianSGD(g, filter=EMA),
        "filter needs a rule of lowrank_geo.optim.filters, got <class",
    ),
    "a retraction of another metric": (
        lambda g: RiemannianSGD(g, metric="product", retraction="svd"),
        "product metric has a retraction of its own, got 'svd'",
    ),
    "a vector as a matrix": (
        lambda g: RiemannianMuon([{"params": [nn.Parameter(torch.ones(2))], "geometry": "matrix"}]),
        r"two or more dimensions, got one of shape \(2,\)",
    ),
    "a tolerance in quotes": (
        lambda g: AugmentedAdam(g, tolerance="0.1"),
        "tolerance needs to be a number, got '0.1'",
    ),
    "a class to wrap": (lambda g: ScheduleFree(RiemannianSGD), "needs an optimizer .* got <class"),
    "a negative euclidean_lr": (
        lambda g: RiemannianMuon(g, euclidean_lr=-1.0),
        r"euclidean_lr needs to be a finite number >= 0, got -1\.0",
    ),
    "a negative euclidean_lr of the groups": (
        lambda g: param_groups(Net(), euclidean_lr=-1.0),
        r"euclidean_lr needs to be a finite number >= 0, got -1\.0",
    ),
    "metrics in a list": (
        lambda g: RiemannianSGD(g, metric=["embedded"]),
        r"'embedded' or 'product', got \['embedded'\]",
    ),
    "retractions in a list": (
        lambda g: RiemannianSGD(g, retraction=["svd"]),
        r"a retraction out of .*, got \['svd'\]",
    ),
    "no parameters": (
        lambda g: RiemannianSGD(None),
        r"RiemannianSGD needs parameter groups, got None; pass lowrank_geo.param_groups\(model\)",
    ),
    "an empty state": (
        lambda g: RiemannianSGD(g).load_state_dict({}),
        r"needs a dict with state and param_groups, got one of \[\]; pass optimizer.state_dict\(\)",
    ),
    "no state": (
        lambda g: RiemannianSGD(g).load_state_dict(None),
        "needs a dict with state and param_groups, got None",
    ),
    "the state of a model": (
        lambda g: RiemannianSGD(g).load_state_dict(nn.Linear(2, 2).state_dict()),
        r"needs a dict with state and param_groups, got one of \['weight', 'bias'\]",
    ),
    "no model": (lambda g: param_groups("model"), "needs a torch.nn.Module, got 'model'"),
    "a negative scale": (lambda g: RiemannianMuon(g, rotation=-1.0), "rotation needs to be >= 0"),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD)
def test_refuses(make, sentence, net):
    with pytest.raises((ValueError, TypeError), match=sentence):
        make(param_groups(net))


def test_refuses_a_split_triple(net):
    triples = param_groups(net)[0]["params"]
    with pytest.raises(ValueError, match="whole triples"):
        RiemannianSGD([{"params": triples[:4], "geometry": "fixed_rank"}])
    with pytest.raises(ValueError, match="keep U, S, V together"):
        RiemannianSGD(net.parameters())


def test_keys_of_the_user_are_kept(net):
    groups = [{**group, "name": "mine", "lr_scale": 0.5} for group in param_groups(net)]
    assert RiemannianSGD(groups).param_groups[0]["lr_scale"] == 0.5


def test_refuses_a_model_whose_layers_are_not_seen(net):
    """`RiemannianMuon(model.parameters())` would treat U, S and V as three matrices like others."""
    with pytest.raises(ValueError, match=r"by their triples, got .* pass lowrank_geo.param_groups"):
        RiemannianMuon(net.parameters())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with pytest.raises(ValueError, match="by their triples"):
            RiemannianMuon(twin.parameters())


def test_refuses_factors_of_several_layers(net):
    groups = param_groups(net)
    (U, S, _), (_, _, V) = net.first.point, net.second.point
    for triple in ([U, S, V], list(net.third.point)[::-1]):
        with pytest.raises(ValueError, match="U, S, V of one layer in this order"):
            RiemannianSGD([{"params": triple, "geometry": "fixed_rank"}, *groups[1:]])


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


@pytest.mark.parametrize("frozen", "USV")
@pytest.mark.parametrize("wrapped", [False, True])
def test_refuses_a_layer_that_was_half_frozen_later(frozen, wrapped):
    layer = LowRankLinear(5, 4, 2)
    optimizer = RiemannianSGD(param_groups(layer, lr=0.1), momentum=0)
    if wrapped:
        optimizer = ScheduleFree(optimizer)
        optimizer.train()
    getattr(layer, frozen).requires_grad_(False)
    layer(torch.ones(3, 5)).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=f"got none of {frozen} for a 4x5 layer"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


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


def test_refuses_the_state_of_a_method_that_keeps_more(net):
    groups = param_groups(net)
    saved = RiemannianAdam(groups).state_dict()
    with pytest.raises(ValueError, match="got one that has variance, too; load a state saved with"):
        RiemannianSGD(groups).load_state_dict(saved)


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
