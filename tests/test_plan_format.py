"""Plan: a table that adds up, and JSON that is checked when it is read."""

import json
import math

import pytest
from tiny_models import mlp
from torch import nn

from lowrank_geo.convert import convert
from lowrank_geo.plan import Plan, plan_ranks


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
