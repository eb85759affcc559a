"""How good predictions are: Dice, IoU, recall, precision of each image, accuracy, and the table of confusions."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class ImageScores(NamedTuple):
    """Scores of each image in [0, 1]. Shapes: (N) each, float64."""

    dice: np.ndarray
    iou: np.ndarray
    recall: np.ndarray
    precision: np.ndarray


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """How often each true class (row) was taken for each class (column), of each image.

    Shapes: predicted, truth (B, ...) integers below classes -> (B, classes, classes), int64.

    >>> confusion(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 0]]), 2).tolist()
    [[[1, 1], [0, 1]]]
    """
    pairs = truth.flatten(1).long() * classes + predicted.flatten(1).long()
    counts = torch.stack([torch.bincount(p, minlength=classes**2) for p in pairs])
    return counts.unflatten(1, (classes, classes))


def image_scores(counts: np.ndarray) -> ImageScores:
    """The scores of each image, the mean over the classes, without background, that it or its prediction has.

    An image with none of them in either is right: all its scores are 1. Where only one side has a class, a quotient
    0 / 0 (the precision of nothing, the recall of nothing) is 1, as in the published harness.
    Shapes: counts (N, C, C) from `confusion`.
    """
    hit = np.diagonal(counts, axis1=1, axis2=2)[:, 1:].astype(float)  # (N, C − 1)
    truth, predicted = counts.sum(2)[:, 1:], counts.sum(1)[:, 1:]
    present = (truth + predicted) > 0

    def mean(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        quotient = np.where(below > 0, above / np.maximum(below, 1), 1.0)
        found = (quotient * present).sum(1) / np.maximum(present.sum(1), 1)
        return np.where(present.any(1), found, 1.0)

    return ImageScores(
        dice=mean(2 * hit, truth + predicted),
        iou=mean(hit, truth + predicted - hit),
        recall=mean(hit, truth),
        precision=mean(hit, predicted),
    )


class ClassScores(NamedTuple):
    """Scores over all images; recall, precision and F1 are means over the classes that occur."""

    accuracy: float
    recall: float
    precision: float
    f1: float


def class_scores(counts: np.ndarray) -> ClassScores:
    """Scores from the table of confusions of all images; a class never predicted has precision 0.

    Shapes: counts (C, C).

    >>> class_scores(np.array([[3, 1], [0, 4]])).accuracy
    0.875
    """
    hit = np.diagonal(counts).astype(float)
    truth, predicted = counts.sum(1), counts.sum(0)
    occurs = truth > 0

    def mean(above: np.ndarray, below: np.ndarray) -> float:
        return float((above / np.maximum(below, 1))[occurs].mean()) if occurs.any() else 0.0

    accuracy = float(hit.sum() / max(counts.sum(), 1))
    return ClassScores(
        accuracy, mean(hit, truth), mean(hit, predicted), mean(2 * hit, truth + predicted)
    )
