"""TrainConfig: JSON round trip, and one sentence for each value that no run can have."""

import json
import math

import pytest

from lowrank_geo.train.config import TrainConfig


def test_survives_json():
    config = TrainConfig(data="<b>.txt", rank=8, lr=1 / 3, warmup=3)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_keeps_half_the_parameters_if_nothing_else_is_said():
    assert TrainConfig().size == {"budget": 0.5}
    assert TrainConfig(ratio=0.25).size == {"ratio": 0.25}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lr": -1.0}, "--lr to be a positive number, got -1.0"),
        ({"lr": math.nan}, "--lr to be a positive number, got nan"),
        ({"euclidean_lr": math.inf}, "--euclidean-lr to be a positive number, got inf"),
        ({"weight_decay": -0.1}, "--weight-decay to be a number from 0 on, got -0.1"),
        ({"steps": 0}, "--steps to be at least 1, got 0"),
        ({"batch": -4}, "--batch to be at least 1, got -4"),
        ({"accumulate": 3}, "--accumulate to divide --batch 16, got 3"),
        ({"clip": 0.0}, "--clip to be a positive number, got 0.0"),
        ({"warmup": 99, "steps": 9}, "--warmup to be at most --steps 9, got 99"),
        ({"schedule": "linear"}, "--schedule to be one of wsd, cosine, constant, got linear"),
        ({"dtype": "float16"}, "--dtype to be one of auto, float32, bfloat16, got float16"),
        ({"seed": -1}, "--seed to be at least 0"),
        (
            {"budget": 0.5, "rank": 4},
            "one of --budget, --rank and --ratio, got --budget and --rank",
        ),
        ({"vocab_size": 300}, "no --vocab-size with --tokenizer bytes, got 300"),
    ],
)
def test_refuses(options, said):
    with pytest.raises(ValueError, match=said) as refused:
        TrainConfig(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [{}, [], {**TrainConfig().to_json(), "stepz": 1}])
def test_refuses_json_of_other_options(value):
    with pytest.raises(ValueError, match="exactly the options of this version"):
        TrainConfig.from_json(value)


@pytest.mark.parametrize("steps", ["9", True, 1.5, None])
def test_refuses_json_of_other_types(steps):
    with pytest.raises(ValueError, match="--steps to be int"):
        TrainConfig.from_json({**TrainConfig().to_json(), "steps": steps})
