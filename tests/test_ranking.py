"""ranking: ranks by number and by pattern, and every wish that makes no sense refused in one sentence."""

import math

import pytest
from tiny_models import mlp
from torch import nn

from lowrank_geo.plan import plan_ranks


def test_one_rank_leaves_layers_dense_that_it_does_not_shrink():
    plan = plan_ranks(mlp(64, 64, 8), rank=20)
    assert plan.ranks == {"0": 20}
    assert plan.entries[1].reason.startswith("rank 20 does not save parameters")


def test_first_pattern_decides_and_others_stay_dense():
    model = nn.ModuleDict(
        {"mlp": nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)})}
    )
    model["out"] = nn.Linear(32, 32)
    plan = plan_ranks(model, {"mlp.up": 4, "mlp": 6})
    assert plan.ranks == {"mlp.up": 4, "mlp.down": 6}
    assert plan.entries[2].reason == "no pattern in ranks matches it"


def test_smallest_reachable_budget_is_named_and_reachable():
    model = mlp(40, 40, 40)
    with pytest.raises(
        ValueError, match=r"needs budget >= 0\.\d{4} at min_rank 4, got 0\.1"
    ) as caught:
        plan_ranks(model, budget=0.1, min_rank=4)
    smallest = float(str(caught.value).split(">= ")[1].split()[0])
    assert plan_ranks(model, budget=smallest, min_rank=4).ranks == {"0": 4, "1": 4}
    with pytest.raises(ValueError, match="needs budget"):
        plan_ranks(model, budget=smallest - 2e-4, min_rank=4)


REFUSED = {
    "none": ({}, "exactly one of budget, rank, ratio, ranks, got none"),
    "two": ({"budget": 0.5, "rank": 2}, "got budget and rank"),
    "budget 0": ({"budget": 0.0}, r"budget in \(0, 1\], got 0.0"),
    "budget above 1": ({"budget": 1.5}, r"budget in \(0, 1\], got 1.5"),
    "budget NaN": ({"budget": math.nan}, r"budget in \(0, 1\], got nan"),
    "ratio negative": ({"ratio": -0.1}, r"ratio in \(0, 1\], got -0.1"),
    "rank 0": ({"rank": 0}, "rank >= 1, got 0"),
    "rank too large": ({"rank": 33}, "rank <= 32, the largest min.m, n. of the layers, got 33"),
    "pattern rank 0": ({"ranks": {"0": 0}}, "the rank of '0' >= 1, got 0"),
    "pattern rank too large": ({"ranks": {"1": 9}}, "the rank of '1' <= 8, .* got 9"),
    "pattern without match": ({"ranks": {"q_proj": 2}}, "got 'q_proj', which matches none"),
    "pattern on ReLU": ({"ranks": {"2": 2}}, "got '2', which matches none"),
    "pattern shadowed": ({"ranks": {"*": 2, "0": 4}}, "'0': an earlier pattern has it"),
    "pattern skipped": ({"ranks": {"0": 2}, "skip": ["0"]}, "'0': skipped by the pattern '0'"),
    "skip without match": ({"rank": 2, "skip": ["q_proj"]}, "in skip .* got 'q_proj'"),
    "min_rank 0": ({"budget": 0.5, "min_rank": 0}, "min_rank >= 1, got 0"),
    "multiple_of 0": ({"budget": 0.5, "multiple_of": 0}, "multiple_of >= 1, got 0"),
    "min_rank with rank": ({"rank": 2, "min_rank": 2}, "with budget or ratio only"),
    "init": ({"rank": 2, "init": "pca"}, "init out of svd, spectral, orthogonal, got 'pca'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_sentence(name):
    wishes, message = REFUSED[name]
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8), nn.ReLU())
    with pytest.raises(ValueError, match=message) as caught:
        plan_ranks(model, **wishes)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


@pytest.mark.parametrize(
    "wishes", [{"rank": 2.5}, {"rank": True}, {"budget": "half"}, {"ranks": 3}]
)
def test_refuses_a_value_of_another_type(wishes):
    with pytest.raises(TypeError, match="plan_ranks needs"):
        plan_ranks(mlp(32, 32), **wishes)


def test_refuses_uninitialised_parameters():
    with pytest.raises(ValueError, match="got the uninitialised '0.weight'"):
        plan_ranks(nn.Sequential(nn.LazyLinear(8)), rank=2)
