"""Masks as stored become masks of classes; values that cannot be meant are refused."""

from pathlib import Path

import numpy as np

from lowrank_geo.images.bad_files import BadFile

BLACK, WHITE = (
    64,
    191,
)  # JPEG moves the 0 and 255 of a binary mask, by less than a quarter of the range
LOSSY = (".jpg", ".jpeg")
EDGES = 0.01  # of the pixels that strong JPEG compression may move further: 0.5 % at quality 30


def classes_of(labels: np.ndarray, classes: int, path: Path) -> np.ndarray:
    """The class of each pixel of a PNG or JPEG mask: 0 and 1, 0 and 255, or with more classes 0 to classes − 1.

    Shapes: labels (H, W), integers -> (H, W), uint8.
    Raises: BadFile, naming the file `path`, for any other value.
    """
    if _within(labels, classes):
        return labels.astype(np.uint8)
    if classes > 2:
        raise BadFile(
            f"a mask of {classes} classes needs the values 0 to {classes - 1}, got {_told(labels)} in {path}"
        )
    between = (labels > BLACK) & (labels < WHITE)
    allowed = EDGES if path.suffix.lower() in LOSSY else 0
    outside = (labels < 0) | (labels > 255)
    # A mask of small labels is not a dark picture of one.
    if outside.any() or between.mean() > allowed or labels.max() < WHITE:
        raise BadFile(
            f"a mask of 2 classes needs the values 0 and 1, or 0 and 255, got {_told(labels)} in {path}"
        )
    return (labels > 127).astype(np.uint8)


def classes_of_volume(labels: np.ndarray, classes: int, path: Path) -> np.ndarray:
    """The class of each voxel; with 2 classes all labels above 0 are one, as a liver includes its tumours.

    Shapes: labels (...), any real type -> (...), uint8.
    Raises: BadFile, naming the file `path`, for values that are no labels.
    """
    whole = labels.astype(np.int64)
    if not np.array_equal(whole, labels) or whole.min() < 0:
        raise BadFile(f"a mask needs whole numbers from 0 on, got {_told(labels)} in {path}")
    if classes == 2:
        return (whole > 0).astype(np.uint8)
    if not _within(whole, classes):
        raise BadFile(
            f"a mask of {classes} classes needs the values 0 to {classes - 1}, got {_told(labels)} in {path}"
        )
    return whole.astype(np.uint8)


def _within(labels: np.ndarray, classes: int) -> bool:
    return bool(labels.min() >= 0 and labels.max() < classes)


def _told(labels: np.ndarray) -> str:
    values = np.unique(labels)
    listed = ", ".join(f"{v:g}" for v in values[:5])
    return f"{listed}, ..., {values[-1]:g}" if len(values) > 5 else listed
