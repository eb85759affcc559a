"""plan_ranks: the budget is a hard number, one ratio for all layers, and every dense layer has its reason."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank_geo.allocation import Matrix, allocate, factored_size, largest_saving_rank
from lowrank_geo.convert import convert
from lowrank_geo.plan import Plan, current_plan, plan_ranks


def numel(model):
    return sum(p.numel() for p in model.parameters())


def mlp(*widths, bias=True):
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(nn.Linear(n, m, bias) for n, m in pairs))


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


@given(st.integers(0, 60), st.integers(0, 60))
def test_largest_saving_rank_is_the_last_with_fewer_parameters(m, n):
    r = largest_saving_rank(m, n)
    assert r == 0 or factored_size(m, n, r) < m * n
    assert factored_size(m, n, r + 1) >= m * n


def test_allocate_refuses_a_limit_below_the_lowest_ranks():
    with pytest.raises(ValueError, match="at least 17 parameters, got 16"):
        allocate([Matrix.of(8, 8)], 16)


def test_full_budget_keeps_everything_dense():
    plan = plan_ranks(mlp(32, 48, 16), budget=1.0)
    assert plan.ranks == {} and plan.slack == 0


def test_budget_counts_embeddings_and_tied_weights_once():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 16), "fc": nn.Linear(16, 64)})
    model["head"] = nn.Linear(16, 50, bias=False)
    model["head"].weight = model["embed"].weight
    plan = plan_ranks(model, budget=0.9)
    assert plan.dense_parameters == 50 * 16 + 17 * 64
    assert list(plan.ranks) == ["fc"]
    assert "tied" in plan.entries[1].reason and "everything else" in str(plan)


def test_table_counts_a_weight_of_two_layers_once():
    model = mlp(16, 16, 16, bias=False)
    model[1].weight = model[0].weight
    plan = plan_ranks(model, budget=1.0)
    assert [e.dense_parameters for e in plan.entries] == [256, 0]


class Sub(nn.Linear):
    pass


def hooked():
    layer = nn.Linear(32, 32)
    layer.register_forward_hook(lambda *_: None)
    return layer


def int8():
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    return layer


def pruned():
    return prune.l1_unstructured(nn.Linear(32, 32), "weight", amount=0.5)


def with_replaced_forward():
    layer = nn.Linear(32, 32)
    layer.forward = lambda x: x
    return layer


def with_an_adapter():
    layer = nn.Linear(32, 32)
    layer.register_parameter("adapter", nn.Parameter(torch.zeros(2)))
    return layer


DENSE = {
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
        "parametrized: weight",
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(32, 32)), "parametrized: weight"),
    "pruned": (pruned, "computed from other parameters"),
    "subclass": (lambda: Sub(32, 32), "a Sub, only Linear"),
    "int8": (int8, "int8, quantised"),
    "grouped": (lambda: nn.Conv2d(32, 32, 3, groups=4), "of 4 groups"),
    "transposed": (lambda: nn.ConvTranspose2d(32, 32, 3), "a ConvTranspose2d"),
    "conv1d": (lambda: nn.Conv1d(32, 32, 3), "a Conv1d, only"),
    "hooked": (hooked, "hooks"),
    "replaced forward": (with_replaced_forward, "hooks or a replaced forward"),
    "adapter": (with_an_adapter, "also holds adapter"),
    "too small": (lambda: nn.Linear(3, 1), "no rank from 1 up saves"),
    "empty": (lambda: nn.Conv2d(1, 1, 1), "no rank from 1 up saves"),
}


@pytest.mark.parametrize("name", DENSE)
def test_stays_dense_with_its_reason(name):
    build, reason = DENSE[name]
    model = nn.Sequential(build(), nn.Linear(64, 64))
    plan = plan_ranks(model, ratio=0.1)
    assert reason in plan.entries[0].reason
    assert plan.ranks == {"1": 6}
    assert numel(convert(model, plan)) == plan.parameters


def test_attention_stays_dense_but_the_mlp_of_its_block_does_not():
    plan = plan_ranks(nn.TransformerEncoderLayer(32, 2, 64), ratio=0.25)
    reasons = {e.name: e.reason for e in plan.entries}
    assert "MultiheadAttention" in reasons["self_attn"]
    assert "MultiheadAttention" in reasons["self_attn.out_proj"]
    assert plan.ranks == {"linear1": 8, "linear2": 8}


def test_a_plain_linear_put_into_attention_stays_dense():
    attention = nn.MultiheadAttention(32, 2)
    attention.out_proj = nn.Linear(32, 32)
    assert plan_ranks(attention, ratio=0.25).ranks == {}


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


def test_skip_means_everything_inside_and_names_its_pattern():
    model = nn.ModuleDict({"a": mlp(32, 32, 32), "b": mlp(32, 32)})
    plan = plan_ranks(model, ratio=0.25, skip="a")
    assert list(plan.ranks) == ["b.0"]
    assert plan.entries[0].reason == "skipped by the pattern 'a'"


def test_lm_head_is_skipped_by_default():
    model = nn.ModuleDict({"lm_head": nn.Linear(32, 32), "fc": nn.Linear(32, 32)})
    assert list(plan_ranks(model, rank=2).ranks) == ["fc"]
    assert list(plan_ranks(model, rank=2, skip=()).ranks) == ["lm_head", "fc"]


def test_works_on_meta_and_changes_nothing():
    with torch.device("meta"):
        model = mlp(64, 64, 64)
    before = dict(model.named_parameters())
    assert plan_ranks(model, budget=0.5).ranks == plan_ranks(mlp(64, 64, 64), budget=0.5).ranks
    assert all(p is before[name] for name, p in model.named_parameters())


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


def test_table_is_aligned_and_adds_up():
    plan = plan_ranks(nn.Sequential(nn.Embedding(9, 32), mlp(32, 64, 64)), budget=0.5)
    *rows, total, last = str(plan).splitlines()
    cells = [row.split("  ") for row in rows]
    end = rows[0].index("dense") + len("dense")
    numbers = [int(row[:end].split()[-1].replace(",", "")) for row in rows[1:]]
    assert sum(numbers) == plan.dense_parameters == int(total.split()[-1].replace(",", ""))
    assert len(cells) == 4 and f"slack {plan.slack}" in last
    assert f"the budget 0.5 allows {plan.parameters + plan.slack:,}" in last


def test_json_round_trip_is_the_same_plan():
    plan = convert(mlp(32, 48, 16), budget=0.6).lowrank_plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


CORRUPT = {
    "not an object": lambda data: [data],
    "a field missing": lambda data: {k: v for k, v in data.items() if k != "slack"},
    "a foreign field": lambda data: {**data, "color": 1},
    "rank too large": lambda data: edit(data, rank=10**9),
    "rank 0": lambda data: edit(data, rank=0),
    "rank as text": lambda data: edit(data, rank="4"),
    "rank as bool": lambda data: edit(data, rank=True),
    "another rank": lambda data: edit(data, rank=5),
    "negative size": lambda data: edit(data, m=-1),
    "kind": lambda data: edit(data, kind="conv9d"),
    "error NaN": lambda data: edit(data, error=math.nan),
    "total": lambda data: {**data, "parameters": data["parameters"] + 1},
    "init": lambda data: {**data, "init": "pickle"},
    "a name twice": lambda data: {
        **data,
        "entries": data["entries"] * 2,
        "parameters": 2 * data["parameters"],
        "dense_parameters": 2 * data["dense_parameters"],
    },
}


def edit(data, **changes):
    return {**data, "entries": [{**data["entries"][0], **changes}]}


@pytest.mark.parametrize("name", CORRUPT)
def test_from_json_refuses_in_one_sentence(name):
    data = plan_ranks(mlp(32, 32), rank=4).to_json()
    assert Plan.from_json(data).ranks == {"0": 4}
    with pytest.raises(ValueError, match=" needs .*, got ") as caught:
        Plan.from_json(CORRUPT[name](data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
