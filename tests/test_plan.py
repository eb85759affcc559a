"""plan_ranks: the budget is a hard number, one ratio for all layers, and nothing is changed."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import mlp, numel
from torch import nn

from lowrank_geo.allocation import factored_size
from lowrank_geo.convert import convert
from lowrank_geo.plan import current_plan, plan_ranks

WIDTHS = st.lists(st.integers(1, 40), min_size=2, max_size=5)


@given(WIDTHS, st.floats(0.01, 1.0), st.booleans())
def test_parameters_of_the_plan_are_those_of_the_converted_model_and_within_the_budget(
    widths, budget, bias
):
    model = mlp(*widths, bias=bias)
    dense = numel(model)
    try:
        plan = plan_ranks(model, budget=budget, init="orthogonal")
    except ValueError as error:
        assert "needs budget >=" in str(error)
        return
    assert plan.parameters == numel(convert(model, plan)) <= budget * dense
    assert (plan.dense_parameters, plan.slack) == (dense, int(budget * dense) - plan.parameters)


@given(WIDTHS, st.floats(0.3, 1.0), st.integers(1, 3), st.integers(1, 4))
def test_no_further_step_of_rank_fits_the_slack(widths, budget, min_rank, multiple_of):
    try:
        plan = plan_ranks(mlp(*widths), budget=budget, min_rank=min_rank, multiple_of=multiple_of)
    except ValueError:
        return
    for e in plan.entries:
        if e.rank is None:
            continue
        assert e.rank >= min_rank and e.rank % multiple_of == 0
        r = e.rank + multiple_of
        price = min(factored_size(e.m, e.n, r), e.m * e.n) - factored_size(e.m, e.n, e.rank)
        assert price > plan.slack


@given(WIDTHS, st.floats(0.3, 1.0))
def test_ratio_is_the_largest_uniform_one_within_the_budget(widths, budget):
    model = mlp(*widths)
    shapes = [(layer.out_features, layer.in_features) for layer in model]
    ratios = sorted({k / min(s) for s in shapes for k in range(1, min(s) + 1)})  # where ranks step

    def at(ratio):
        ranks = [max(math.floor(ratio * min(s) + 1e-9), 1) for s in shapes]
        costs = [
            min(factored_size(*s, r), math.prod(s)) for s, r in zip(shapes, ranks, strict=True)
        ]
        return ranks, sum(costs) + sum(m for m, _ in shapes)

    fitting = [at(ratio)[0] for ratio in ratios if at(ratio)[1] <= int(budget * numel(model))]
    if fitting:
        found = [e.rank or max(e.m, e.n) for e in plan_ranks(model, budget=budget).entries]
        assert all(f >= r for f, r in zip(found, fitting[-1], strict=True))


def test_layers_of_one_shape_differ_by_one_step_at_most():
    ranks = plan_ranks(mlp(*[64] * 9), budget=0.3).ranks.values()
    assert max(ranks) - min(ranks) == 1


def test_full_budget_keeps_everything_dense():
    plan = plan_ranks(mlp(32, 48, 16), budget=1.0)
    assert plan.ranks == {} and plan.slack == 0


def test_budget_counts_embeddings_and_tied_weights_once():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 16), "wide": nn.Linear(16, 64)})
    model["head"] = nn.Linear(16, 50, bias=False)
    model["head"].weight = model["embed"].weight
    plan = plan_ranks(model, budget=0.9, skip=())
    assert plan.dense_parameters == 50 * 16 + 17 * 64
    assert list(plan.ranks) == ["wide"]
    assert "tied" in plan.entries[1].reason and "everything else" in str(plan)


def test_table_counts_a_weight_of_two_layers_once():
    model = mlp(16, 16, 16, bias=False)
    model[1].weight = model[0].weight
    plan = plan_ranks(model, budget=1.0)
    assert [e.dense_parameters for e in plan.entries] == [256, 0]


def test_works_on_meta_and_changes_nothing():
    with torch.device("meta"):
        model = mlp(64, 64, 64)
    before = dict(model.named_parameters())
    assert plan_ranks(model, budget=0.5).ranks == plan_ranks(mlp(64, 64, 64), budget=0.5).ranks
    assert all(p is before[name] for name, p in model.named_parameters())


def test_low_rank_layers_are_listed_and_left_alone():
    model = convert(mlp(32, 32, 64), {"0": 4})
    plan = plan_ranks(model, rank=8)
    assert plan.ranks == {"0": 4, "1": 8}
    assert plan.entries[0].reason == "already low-rank"
    assert plan.dense_parameters == numel(mlp(32, 32, 64))


def test_current_plan_is_that_of_the_conversion():
    model = convert(mlp(32, 32, 8), budget=0.5)
    assert current_plan(model) == model.lowrank_plan
    assert current_plan(mlp(32, 32)).ranks == {}
