"""Pictures of single cases: the image, the truth on it, the prediction on it; the worst ones first."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from lowrank_geo.images.epochs import in_order
from lowrank_geo.images.reading import Sample

if TYPE_CHECKING:
    from lowrank_geo.images.trainer import ImageTrainer

SHOWN = {True: 12, False: 30}  # cases of segmentation, of classification
SIDE = 256  # pixels that a picture has at least
GAP = 8
# Of the classes 1, 2, ...: those of Okabe and Ito that stand out on grey.
COLOURS = np.array([[230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167], [213, 94, 0]])
TINT = 0.4


def worst_first(places: Sequence[int], values: np.ndarray) -> list[tuple[int, float]]:
    """Places of samples with their values, the lowest first."""
    order = np.argsort(values, kind="stable")
    return [(places[i], float(values[i])) for i in order]


@torch.no_grad()
def draw_cases(
    trainer: "ImageTrainer", ordered: list[tuple[int, float]], folder: Path
) -> list[dict[str, Any]]:
    """Write a PNG for each of the first cases, called after its number, and return what a report says of them."""
    images, segmented = trainer.images, trainer.images.samples[0].target.dim() > 0
    ordered = ordered[: SHOWN[segmented]]
    folder.mkdir(exist_ok=True)
    trainer.model.eval()
    cases = []
    batches = in_order(images, [place for place, _ in ordered], 1)
    for number, ((place, value), batch) in enumerate(zip(ordered, batches, strict=True)):
        sample = images.samples[place]
        logits = trainer.model(batch.images.to(trainer.workers.device)).float().cpu()[0]
        found = logits.argmax(0)
        file = f"{number:03d}.png"
        case = {"file": file, "name": images.names[place], "value": value}
        if segmented:
            picture = triptych(rgb(sample), sample.target.numpy(), found.numpy())
        else:
            picture = enlarged(rgb(sample), SIDE // 2)
            case |= {
                "truth": images.classes[int(sample.target)],
                "found": images.classes[int(found)],
                "probability": float(logits.softmax(0).max()),
            }
        Image.fromarray(picture).save(folder / file)
        cases.append(case)
    return cases


def rgb(sample: Sample) -> np.ndarray:
    """Shapes: -> (H, W, 3), uint8."""
    return sample.image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def triptych(image: np.ndarray, truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The image, the truth in colours, and the prediction in colours with the outline of the truth in white.

    Shapes: image (H, W, 3), uint8; truth, found (H, W), classes -> (H', W', 3), uint8.
    """
    image, truth, found = (enlarged(x, SIDE) for x in (image, truth, found))
    predicted = painted(image, found)
    predicted[outline(truth)] = 255
    gap = np.full((len(image), GAP, 3), 255, np.uint8)
    return np.concatenate([image, gap, painted(image, truth), gap, predicted], axis=1)


def painted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with every class but 0 tinted and outlined in its colour."""
    colours = COLOURS[(mask.astype(int) - 1) % len(COLOURS)]
    tinted = (1 - TINT) * image + TINT * colours
    drawn = np.where((mask > 0)[..., None], tinted, image)
    edge = outline(mask) & (mask > 0)
    drawn[edge] = colours[edge]
    return drawn.round().astype(np.uint8)


def outline(mask: np.ndarray) -> np.ndarray:
    """Where a pixel has another class than one of its four neighbours, on the side of the larger class.

    Shapes: (H, W) -> (H, W), boolean.

    >>> outline(np.array([[0, 1, 1, 1, 0]])).astype(int).tolist()
    [[0, 1, 0, 1, 0]]
    """
    wide = np.pad(mask, 1, mode="edge")
    around = (wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:])
    return np.logical_or.reduce([mask > other for other in around])


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """Every pixel as a square, so that the picture has `side` pixels or more; no image gets smaller."""
    times = max(1, -(-side // image.shape[0]))
    return image.repeat(times, axis=0).repeat(times, axis=1)
