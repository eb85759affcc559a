"""Synthetic CT slices of an abdomen with exact masks: organs are deformed ellipsoids, cut by planes.

Everything about a phantom follows from (seed, patient, difficulty): the same numbers give the same images everywhere.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng

FIELD = 360.0  # mm that an image shows
AIR, FAT = -1000.0, -90.0  # HU
BACKGROUND, ORGAN, LESION = 0, 1, 2  # what a mask holds: the liver, and tumours in it
WAVES = 4  # of the deformation of a surface


class Difficulty(NamedTuple):
    """How hard the liver is to tell from what surrounds it; contrasts and noise in HU."""

    contrast: float  # of the liver over its neighbours
    lesion: float  # how much darker lesions are than the liver
    noise: float  # standard deviation
    deformation: float  # of every surface, as a part of its radius
    lesions: int  # most lesions of a patient


DIFFICULTIES = {
    "easy": Difficulty(contrast=60, lesion=50, noise=15, deformation=0.08, lesions=2),
    "medium": Difficulty(contrast=30, lesion=30, noise=30, deformation=0.16, lesions=4),
    "hard": Difficulty(contrast=12, lesion=18, noise=45, deformation=0.24, lesions=6),
}


class Ellipsoid(NamedTuple):
    """A deformed ellipsoid: the points p whose u = diag(axes)⁻¹ R (p − centre) have |u| ≤ radius(u/|u|)."""

    centre: np.ndarray  # (3) mm: left to right, front to back, up
    axes: np.ndarray  # (3) mm
    rotation: np.ndarray  # (3, 3)
    frequencies: np.ndarray  # (WAVES, 3)
    phases: np.ndarray  # (WAVES)
    deformation: float

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Shapes: points (..., 3) in mm -> (...), boolean."""
        u = ((points - self.centre) @ self.rotation.T) / self.axes
        length = np.linalg.norm(u, axis=-1)
        inside = length <= 1 - self.deformation
        near = ~inside & (length <= 1 + self.deformation)
        waves = np.sin(u[near] / length[near, None] @ self.frequencies.T + self.phases)
        inside[near] = length[near] <= 1 + self.deformation * waves.mean(-1)
        return inside


class Tissue(NamedTuple):
    """What fills an ellipsoid: its density in HU, and its label in the mask."""

    shape: Ellipsoid
    density: float
    label: int


class Slice(NamedTuple):
    """An image in HU and its mask, which is exact: each pixel is labelled by its centre.

    Shapes: image (size, size), float32; mask (size, size), uint8 of BACKGROUND, ORGAN, LESION.
    """

    image: np.ndarray
    mask: np.ndarray


# Centre and half axes in mm, and HU over that of the liver's neighbourhood (0) or of their own (absolute, True).
NEIGHBOURS = (
    ((95.0, 25.0, 10.0), (36.0, 30.0, 60.0)),  # spleen
    ((-62.0, 62.0, -35.0), (27.0, 24.0, 50.0)),  # kidneys
    ((62.0, 62.0, -30.0), (27.0, 24.0, 50.0)),
    ((55.0, -45.0, 15.0), (48.0, 30.0, 40.0)),  # stomach
    ((5.0, -20.0, -20.0), (30.0, 16.0, 22.0)),  # pancreas
)
LIVER = ((-68.0, -12.0, 5.0), (78.0, 68.0, 85.0))


def patient(seed: int, number: int, difficulty: Difficulty) -> list[Tissue]:
    """The tissues of a patient, later ones in front of earlier ones."""
    draw = default_rng([seed, number])
    level = 50.0 + draw.uniform(-10, 10)  # HU of soft tissue
    round_ = difficulty._replace(deformation=0.03)
    tissues = [
        Tissue(ellipsoid(draw, (0, 0, 0), (168, 125, 500), round_), FAT, BACKGROUND),
        Tissue(ellipsoid(draw, (0, 2, 0), (152, 108, 500), round_), level, BACKGROUND),
        Tissue(ellipsoid(draw, (0, 82, 0), (24, 22, 500), round_), 350.0, BACKGROUND),
        Tissue(ellipsoid(draw, (14, 48, 0), (11, 11, 500), round_), 160.0, BACKGROUND),
    ]
    for centre, axes in NEIGHBOURS:
        # As bright as the liver where the task is hard, clearly apart where it is easy.
        density = level + difficulty.contrast * draw.uniform(-1.0, 0.3)
        tissues.append(Tissue(ellipsoid(draw, centre, axes, difficulty), density, BACKGROUND))
    liver = ellipsoid(draw, *LIVER, difficulty)
    density = level + difficulty.contrast
    tissues.append(Tissue(liver, density, ORGAN))
    for _ in range(draw.integers(0, difficulty.lesions + 1)):
        lesion = _lesion(draw, liver, difficulty)
        tissues.append(Tissue(lesion, density - difficulty.lesion, LESION))
    return tissues


def ellipsoid(
    draw: Generator, centre: Sequence[float], axes: Sequence[float], difficulty: Difficulty
) -> Ellipsoid:
    """An ellipsoid near the usual place and size, turned by up to about 10 degrees and deformed."""
    angles = draw.uniform(-0.18, 0.18, 3)
    return Ellipsoid(
        np.asarray(centre, float) + draw.uniform(-6, 6, 3),
        np.asarray(axes, float) * draw.uniform(0.9, 1.1, 3),
        rotation(angles),
        draw.normal(0, 2.5, (WAVES, 3)),
        draw.uniform(0, 2 * np.pi, WAVES),
        difficulty.deformation,
    )


def rotation(angles: np.ndarray) -> np.ndarray:
    """Turns about the three axes, one after the other. Shapes: (3) -> (3, 3)."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def _lesion(draw: Generator, liver: Ellipsoid, difficulty: Difficulty) -> Ellipsoid:
    """A small ellipsoid whose centre is well inside the liver."""
    direction = draw.normal(size=3)
    u = direction / np.linalg.norm(direction) * 0.6 * draw.uniform() ** (1 / 3)
    centre = liver.centre + (u * liver.axes) @ liver.rotation
    return ellipsoid(draw, centre, draw.uniform(7, 18, 3).tolist(), difficulty)


def slices(
    number: int,
    *,
    seed: int = 0,
    difficulty: str = "medium",
    count: int = 8,
    size: int = 256,
) -> Iterator[Slice]:
    """Evenly spaced transverse slices through the liver of patient `number`.

    Raises: ValueError for an unknown difficulty.

    >>> [(s.image.shape, int(s.mask.max())) for s in slices(0, count=1, size=64)]
    [((64, 64), 1)]
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(
            f"phantoms need a difficulty of {', '.join(DIFFICULTIES)}, got {difficulty!r}; use one of them"
        )
    chosen = DIFFICULTIES[difficulty]
    tissues = patient(seed, number, chosen)
    reach = LIVER[1][2]
    for place, z in enumerate(np.linspace(-reach, reach, count + 2)[1:-1] + LIVER[0][2]):
        yield cut(tissues, float(z), size, chosen.noise, default_rng([seed, number, place]))


def cut(tissues: list[Tissue], z: float, size: int, noise: float, draw: Generator) -> Slice:
    """The slice at height z in mm, with noise as a scanner's: it is correlated over two pixels."""
    at = ((np.arange(size) + 0.5) / size - 0.5) * FIELD
    points = np.stack(np.broadcast_arrays(at[None, :], at[:, None], z), -1)  # (size, size, 3)
    image = np.full((size, size), AIR)
    mask = np.zeros((size, size), np.uint8)
    for shape, density, label in tissues:
        # A lesion is part of the liver: what of it stands out of the liver is not there.
        inside = shape.contains(points) & ((label != LESION) | (mask != BACKGROUND))
        image[inside], mask[inside] = density, label
    grain = smooth(draw.normal(size=(size, size)))
    image = smooth(image) + noise * grain / grain.std()
    return Slice(image.clip(AIR, 3000).astype(np.float32), mask)


def smooth(image: np.ndarray) -> np.ndarray:
    """The point spread of the scanner: binomial weights over three pixels each way. Shapes: (H, W) -> (H, W)."""
    for axis in (0, 1):
        edge = [(1, 1) if k == axis else (0, 0) for k in range(2)]
        wide = np.pad(image, edge, mode="edge")
        n = image.shape[axis]
        before, here, after = (wide.take(range(i, i + n), axis) for i in range(3))
        image = (before + 2 * here + after) / 4
    return image
