"""The options of segment and classify: defaults by data, and one sentence for what no run can have."""

import dataclasses

import pytest

from lowrank_geo.images.config import ClassifyConfig, SegmentConfig, filled
from lowrank_geo.train.options import from_json


def test_defaults_are_the_published_ones_for_a_folder():
    config = filled(SegmentConfig(data="folder"))
    assert (config.size, config.epochs, config.batch, config.lr) == (256, 500, 8, 1e-4)
    assert (config.optimizer, config.patience, config.stop_after) == ("adamw", 5, 50)
    assert config.augment and config.weight_decay == 0 and config.data.startswith("/")


def test_defaults_of_the_demos_are_small():
    assert filled(SegmentConfig()).width == 8 and filled(SegmentConfig()).size == 256
    digits = filled(ClassifyConfig())
    assert digits.size == 8 and not digits.augment  # a mirrored 2 is none
    assert filled(ClassifyConfig(data="digits")).epochs == digits.epochs


def test_what_is_given_stays_and_other_optimizers_keep_their_rate():
    config = filled(SegmentConfig(width=5, lr=0.5, optimizer="muon"))
    assert config.width == 5 and config.lr == 0.5 and config.euclidean_lr is None
    assert filled(SegmentConfig(optimizer="muon")).lr is None
    assert filled(SegmentConfig(budget=0.5)).optimizer == "adam"  # torch's leaves the manifold
    assert filled(SegmentConfig(lr=0.5)).euclidean_lr == 0.5


def test_a_config_survives_json():
    config = filled(SegmentConfig(budget=0.5))
    assert from_json(SegmentConfig, config.to_json()) == config
    with pytest.raises(ValueError, match="exactly the options"):
        from_json(SegmentConfig, filled(ClassifyConfig()).to_json())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"gamma": 1.0}, "--gamma to be at least 0 and below 1, got 1.0"),
        ({"gamma": -0.1}, "--gamma to be at least 0 and below 1, got -0.1"),
        ({"gamma": float("nan")}, "--gamma to be at least 0 and below 1, got nan"),
        ({"gamma": 0.0, "mode": "reversible"}, "--gamma above 0 with --mode reversible"),
        ({"mode": "other"}, "--mode to be one of backprop, reversible, got other"),
        ({"budget": 0.5, "rank": 3}, "one of --budget, --rank and --ratio"),
        ({"size": 8, "depth": 4}, r"--size to be at least 2\^depth = 16, got 8"),
        ({"size": 10**6}, "--size to be at most 4096"),
        ({"depth": 11}, "--depth to be at most 10"),
        ({"batch": 0}, "--batch to be at least 1, got 0"),
        ({"optimizer": "sdg"}, "--optimizer to be one of adam, .*, got sdg"),
        ({"window": "brain"}, "--window to be one of abdomen, .*, got brain"),
    ],
)
@pytest.mark.parametrize("cls", [SegmentConfig, ClassifyConfig])
def test_refuses_what_no_run_can_have(cls, options, said):
    with pytest.raises(ValueError, match=f"{cls.command} needs {said}") as error:
        cls(**options)
    assert "\n" not in str(error.value)


def test_refuses_what_one_command_cannot_have():
    with pytest.raises(ValueError, match="--classes to be at least 2, got 1"):
        SegmentConfig(classes=1)
    with pytest.raises(ValueError, match="--difficulty to be one of easy, medium, hard"):
        SegmentConfig(difficulty="harder")
    with pytest.raises(ValueError, match="no --size for the digits, .* got 64"):
        ClassifyConfig(size=64)
    with pytest.raises(TypeError, match="--gamma to be float, got 'a'"):
        SegmentConfig(gamma="a")


def test_every_option_says_what_it_is():
    for cls in (SegmentConfig, ClassifyConfig):
        assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(cls))
