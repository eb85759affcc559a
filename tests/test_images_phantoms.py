"""phantoms: exact masks, the same images from the same numbers, and difficulties that are graded."""

import numpy as np
import pytest

from lowrank_geo.images import phantoms
from lowrank_geo.images.phantoms import DIFFICULTIES, Ellipsoid, slices

FLAT = {"frequencies": np.zeros((4, 3)), "phases": np.zeros(4), "deformation": 0.0}


def test_an_undeformed_slice_has_the_area_of_the_ellipse():
    """The section of an ellipsoid (a, b, c) at height z is an ellipse of area πab(1 − z²/c²)."""
    body = Ellipsoid(np.zeros(3), np.array([80.0, 60.0, 70.0]), np.eye(3), **FLAT)
    tissue = [phantoms.Tissue(body, 50.0, phantoms.ORGAN)]
    for z in (0.0, 30.0, 60.0):
        cut = phantoms.cut(tissue, z, 256, 0.0, np.random.default_rng(0))
        area = cut.mask.sum() * (phantoms.FIELD / 256) ** 2
        assert abs(area / (np.pi * 80 * 60 * (1 - (z / 70) ** 2)) - 1) < 0.01


def test_a_deformed_surface_is_the_formula_point_by_point():
    draw = np.random.default_rng(3)
    shape = phantoms.ellipsoid(draw, (5, -3, 2), (40, 30, 50), DIFFICULTIES["hard"])
    points = draw.uniform(-60, 60, (500, 3))
    found = shape.contains(points)
    for point, inside in zip(points, found, strict=True):
        u = np.diag(1 / shape.axes) @ shape.rotation @ (point - shape.centre)
        length = np.sqrt(u @ u)
        waves = [
            np.sin(f @ u / length + p) for f, p in zip(shape.frequencies, shape.phases, strict=True)
        ]
        assert inside == (length <= 1 + shape.deformation * np.mean(waves))
    assert 0.05 < found.mean() < 0.95
    assert np.allclose(shape.rotation @ shape.rotation.T, np.eye(3))


def test_the_same_numbers_give_the_same_images():
    first, second = (list(slices(4, seed=1, count=3, size=64)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.image, other.image) and np.array_equal(one.mask, other.mask)
    others = [next(slices(4, seed=2, count=3, size=64)), next(slices(5, seed=1, count=3, size=64))]
    assert all(not np.array_equal(first[0].image, other.image) for other in others)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_slice_shows_the_organ_and_lesions_are_inside(difficulty):
    found = [s for n in range(4) for s in slices(n, difficulty=difficulty, count=4, size=96)]
    assert all(s.image.dtype == np.float32 and s.mask.dtype == np.uint8 for s in found)
    assert all(0.002 < (s.mask > 0).mean() < 0.3 for s in found)
    assert any((s.mask == phantoms.LESION).any() for s in found)


def test_the_levels_are_graded():
    """The liver stands out from its surroundings by fewer standard deviations of the noise."""

    def visibility(difficulty):
        s = list(slices(1, difficulty=difficulty, count=3, size=128))[1]
        liver = s.image[s.mask == phantoms.ORGAN]
        rest = s.image[(s.mask == 0) & (s.image > -20) & (s.image < 130)]
        return (liver.mean() - np.median(rest)) / rest.std()

    assert visibility("easy") > 2 * visibility("medium") > 4 * visibility("hard") > 0


def test_refuses_an_unknown_difficulty():
    with pytest.raises(ValueError, match="easy, medium, hard, got 'fair'"):
        next(slices(0, difficulty="fair"))
