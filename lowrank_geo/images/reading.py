"""One image, or a volume of them, with mask or label: from files of any kind to tensors of one size."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_geo.images import dicom, nifti, pictures
from lowrank_geo.images.bad_files import BadFile
from lowrank_geo.images.masks import classes_of, classes_of_volume
from lowrank_geo.images.windows import window


class Source(NamedTuple):
    """The files of an image, or of a volume of images, and what their place in the folder says of them."""

    image: Path
    mask: Path | None = None
    label: int | None = None  # of the class, where there is no mask
    patient: str | None = None  # a digest
    part: str | None = None  # "train", "val" or "test", where that is given


class Settings(NamedTuple):
    """How files are read."""

    size: int = 256
    classes: int = 2
    window: str = "abdomen"
    empty: bool = False  # whether slices of a volume without any organ count


class Sample(NamedTuple):
    """An image and what is to be learned from it.

    `place` is the file, `index` the slice in it; `public` says whether the name of the file may be shown: that of a
    picture may, while files from a scanner are often called after the patient.
    """

    image: Tensor  # (C, size, size), uint8; C is 1 or 3
    target: Tensor  # (size, size), uint8 classes, or (), the label
    patient: str | None = None
    part: str | None = None
    place: str = ""
    index: int = 0  # type: ignore[assignment]
    public: bool = False


def read(source: Source, settings: Settings) -> Iterator[Sample]:
    """The samples of a source.

    Raises: BadFile for files that cannot be read, do not match, or hold what no image or mask holds.
    """
    if is_volume(source.image):
        yield from _slices(source, settings)
        return
    pixels, patient = _read_pixels(source.image, settings)
    patient = source.patient or patient
    public = patient is None and source.image.suffix.lower() in pictures.SUFFIXES
    known = (patient, source.part, str(source.image), 0, public)
    yield Sample(grey_levels(pixels, settings.size), _target(source, pixels, settings), *known)


def is_volume(path: Path) -> bool:
    return path.name.lower().endswith(nifti.SUFFIXES)


def _read_pixels(path: Path, settings: Settings) -> tuple[np.ndarray, str | None]:
    suffix = path.suffix.lower()
    if suffix in pictures.SUFFIXES:
        return pictures.read_picture(path), None
    if suffix in dicom.SUFFIXES or (not suffix and dicom.is_dicom(path)):
        return dicom.read_dicom(path, settings.window)
    raise BadFile(f"an image needs to be PNG, JPEG, DICOM or NIfTI, got {path}")


def _target(source: Source, pixels: np.ndarray, settings: Settings) -> Tensor:
    if source.mask is None:
        assert source.label is not None
        return torch.tensor(source.label)
    if source.mask.suffix.lower() not in pictures.SUFFIXES:
        raise BadFile(f"the mask of an image needs to be PNG or JPEG, got {source.mask}")
    labels = pictures.read_labels(source.mask)
    if labels.shape != pixels.shape[:2]:
        raise BadFile(
            f"a mask needs the size of its image {source.image}, {_size(pixels)}, got {_size(labels)} in {source.mask}"
        )
    return resize_mask(classes_of(labels, settings.classes, source.mask), settings.size)


def _slices(source: Source, settings: Settings) -> Iterator[Sample]:
    """The slices of a volume whose mask is not empty, or all of them."""
    if source.mask is None or not is_volume(source.mask):
        raise BadFile(f"a volume needs a mask that is a volume, got {source.mask or source.image}")
    (volume, affine), (labels, other) = map(nifti.read_volume, (source.image, source.mask))
    if volume.shape != labels.shape:
        raise BadFile(
            f"a mask needs the shape of its volume {source.image}, {volume.shape}, got {labels.shape} in {source.mask}"
        )
    if not np.allclose(affine, other, atol=1e-2, rtol=1e-3):
        raise BadFile(
            f"a mask needs the position and spacing of its volume {source.image}, got others in {source.mask}"
        )
    masks = nifti.transverse(classes_of_volume(labels, settings.classes, source.mask))
    patient = source.patient or dicom.digest(str(source.image))
    for index, (values, mask) in enumerate(zip(nifti.transverse(volume), masks, strict=True)):
        if settings.empty or mask.any():
            image = grey_levels(window(values, settings.window), settings.size)
            target = resize_mask(mask, settings.size)
            yield Sample(image, target, patient, source.part, str(source.image), index)


def grey_levels(pixels: np.ndarray, size: int) -> Tensor:
    """An image at the size of the network, 8 bits a channel.

    Shapes: pixels (H, W) or (H, W, 3) in [0, 1] -> (1 or 3, size, size), uint8.
    """
    image = torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)[None].float()
    if image.shape[-2:] != (size, size):
        image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return (image[0] * 255).round().clamp(0, 255).to(torch.uint8)


def resize_mask(mask: np.ndarray, size: int) -> Tensor:
    """A mask at the size of the network, each pixel the class at its centre. Shapes: (H, W) -> (size, size), uint8."""
    labels = torch.from_numpy(np.ascontiguousarray(mask))[None, None]
    if mask.shape != (size, size):
        labels = F.interpolate(labels, (size, size), mode="nearest-exact")
    return labels[0, 0]


def content(sample: Sample) -> str:
    """A digest of the image: equal for equal images."""
    return hashlib.sha256(sample.image.numpy().tobytes()).hexdigest()


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
