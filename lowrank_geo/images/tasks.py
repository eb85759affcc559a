"""What differs between segmentation and classification: data, network, loss, scores."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from lowrank_geo.convert import convert
from lowrank_geo.images import collect
from lowrank_geo.images.collect import Images
from lowrank_geo.images.config import ClassifyConfig, ImageConfig, SegmentConfig
from lowrank_geo.images.intervals import Interval, interval, mean_interval
from lowrank_geo.images.losses import classification_loss, segmentation_loss
from lowrank_geo.images.reading import Settings
from lowrank_geo.images.scores import ClassScores, ImageScores, class_scores, image_scores
from lowrank_geo.models import MomentumClassifier, MomentumUNet
from lowrank_geo.plan import current_plan

PHANTOMS = 0  # the seed of the demo's data, so that all seeds of a model see the same


class Task(NamedTuple):
    """`score` is the name of the one by which the best epoch is chosen; `network` takes channels and classes."""

    config: type[ImageConfig]
    read: Callable[[Any], Images]
    network: Callable[[Any, int, int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    unit: str
    score: str
    means: Callable[[np.ndarray], dict[str, float]]
    intervals: Callable[[np.ndarray, Sequence[str]], dict[str, Interval]]


def read_segmentation(config: SegmentConfig) -> Images:
    assert config.size is not None
    settings = Settings(config.size, config.classes, config.window, config.empty)
    if config.data is None:
        return collect.phantoms(settings, difficulty=config.difficulty, seed=PHANTOMS)
    return collect.segmentation_folder(Path(config.data), settings, skip_bad=config.skip_bad)


def read_classification(config: ClassifyConfig) -> Images:
    assert config.size is not None
    if config.data is None or config.is_demo:
        return collect.digits()
    settings = Settings(config.size, window=config.window)
    return collect.class_folder(Path(config.data), settings, skip_bad=config.skip_bad)


def unet(config: SegmentConfig, channels: int, classes: int) -> nn.Module:
    sizes: Any = (config.width, config.depth, config.blocks, config.gamma, config.mode)
    bottleneck: Any = config.bottleneck
    return MomentumUNet(channels, classes, *sizes, bottleneck=bottleneck)


def classifier(config: ClassifyConfig, channels: int, classes: int) -> nn.Module:
    sizes: Any = (config.width, config.depth, config.blocks, config.gamma, config.mode)
    return MomentumClassifier(channels, classes, *sizes)


def image_means(counts: np.ndarray) -> dict[str, float]:
    """Means over the images. Shapes: counts (N, C, C)."""
    return {k: float(v.mean()) for k, v in image_scores(counts)._asdict().items()}


def image_intervals(counts: np.ndarray, groups: Sequence[str]) -> dict[str, Interval]:
    scores = image_scores(counts)._asdict()
    return {name: mean_interval(values, groups) for name, values in scores.items()}


def class_means(counts: np.ndarray) -> dict[str, float]:
    """Scores over all images together. Shapes: counts (N, C, C)."""
    return class_scores(counts.sum(0))._asdict()


def class_intervals(counts: np.ndarray, groups: Sequence[str]) -> dict[str, Interval]:
    def score(name: str) -> Callable[[np.ndarray], float]:
        return lambda total: getattr(class_scores(total), name)

    return {name: interval(counts, groups, score(name)) for name in ClassScores._fields}


SEGMENT = Task(
    SegmentConfig, read_segmentation, unet, segmentation_loss, "BCE + Dice",
    ImageScores._fields[0], image_means, image_intervals,
)  # fmt: skip
CLASSIFY = Task(
    ClassifyConfig, read_classification, classifier, classification_loss, "nats per image",
    ClassScores._fields[0], class_means, class_intervals,
)  # fmt: skip
TASKS = {task.config.command: task for task in (SEGMENT, CLASSIFY)}


def task_of(config: ImageConfig) -> Task:
    return TASKS[config.command]


def new_network(config: ImageConfig, channels: int, classes: int) -> nn.Module:
    """The network of a config, converted if it asks for that; `lowrank_plan` says what it became.

    Raises: ValueError for a rank, ratio, budget or init that cannot be.
    """
    net = task_of(config).network(config, channels, classes)
    if config.sizes:
        return convert(net, init=config.init, **config.sizes)
    net.lowrank_plan = current_plan(net)  # type: ignore[assignment]
    return net
