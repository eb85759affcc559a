"""All images of a run in memory, 8 bits a channel: from a folder, or made on the spot."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lowrank_geo.images import folders
from lowrank_geo.images.bad_files import Tolerance
from lowrank_geo.images.dicom import digest
from lowrank_geo.images.lists import listed
from lowrank_geo.images.phantoms import slices
from lowrank_geo.images.reading import (
    Sample,
    Settings,
    Source,
    content,
    grey_levels,
    read,
    resize_mask,
)
from lowrank_geo.images.splits import NAMES, Item, Split, split
from lowrank_geo.images.windows import window

MEMORY = 0.7  # of the machine's that images may take
PATIENTS, SLICES = 20, 6  # of the phantoms


class Images(NamedTuple):
    """What a run trains on. `names` are what a report may show: never a patient's, nor that of a scanner's file."""

    samples: list[Sample]
    names: list[str]
    split: Split
    classes: list[str]
    description: str
    fingerprint: str
    skipped: list[str]

    @property
    def channels(self) -> int:
        """3 if any image has colours."""
        return max(sample.image.shape[0] for sample in self.samples)


def segmentation_folder(root: Path, settings: Settings, *, skip_bad: bool) -> Images:
    """The images and masks of a folder.

    Raises: ValueError or BadFile, in one sentence, for a folder or a file that cannot be used.
    """
    tolerance = Tolerance(skip_bad)
    sources = folders.segmentation_sources(root, tolerance)
    samples = _read_all(listed(sources, root, tolerance), settings, tolerance)
    classes = ["background", *(f"class {i}" for i in range(1, settings.classes))]
    if settings.classes == 2:
        classes = ["background", "foreground"]
    images = _images(samples, classes, "images and masks of a folder", tolerance)
    check_masks(images)
    return images


def class_folder(root: Path, settings: Settings, *, skip_bad: bool) -> Images:
    """The images of class folders.

    Raises: as `segmentation_folder`.
    """
    tolerance = Tolerance(skip_bad)
    sources, classes = folders.class_sources(root, tolerance)
    samples = _read_all(listed(sources, root, tolerance), settings, tolerance)
    return _images(samples, classes, "class folders", tolerance)


def phantoms(settings: Settings, *, difficulty: str, seed: int, patients: int = PATIENTS) -> Images:
    """Synthetic CT; with 2 classes lesions are part of the organ, with 3 a class of their own.

    Raises: ValueError for another number of classes or an unknown difficulty.
    """
    if settings.classes not in (2, 3):
        raise ValueError(
            f"phantoms need --classes 2 (organ) or 3 (organ, lesion), got {settings.classes}; use one of them"
        )
    samples = []
    for number in range(patients):
        drawn = slices(number, seed=seed, difficulty=difficulty, count=SLICES, size=settings.size)
        for index, (image, mask) in enumerate(drawn):
            grey = grey_levels(window(image, settings.window), settings.size)
            target = resize_mask(np.minimum(mask, settings.classes - 1), settings.size)
            samples.append(Sample(grey, target, digest(f"phantom {number:05d}"), index=index))
    classes = ["background", "organ", "lesion"][: settings.classes]
    return _images(samples, classes, f"{difficulty} phantoms", Tolerance(False))


def digits() -> Images:
    """scikit-learn's 1 797 handwritten digits, 8 × 8.

    Raises: ModuleNotFoundError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "the digits need the package scikit-learn, got none; pip install 'lowrank-geo[images]'"
        ) from missing
    data = load_digits()
    samples = [
        Sample(grey_levels(image / 16, 8), torch.tensor(int(label)), index=index, public=True)
        for index, (image, label) in enumerate(zip(data.images, data.target, strict=True))
    ]
    return _images(samples, [str(n) for n in range(10)], "scikit-learn's digits", Tolerance(False))


def check_masks(images: Images) -> None:
    """Raise ValueError if the masks to train on are all of one class."""
    found = {int(v) for i in images.split.train for v in images.samples[i].target.unique()}
    if len(found) < 2:
        raise ValueError(
            f"segmentation needs masks of two classes or more to train on, got only {found}; check the masks"
        )


def _read_all(sources: list[Source], settings: Settings, tolerance: Tolerance) -> Iterator[Sample]:
    held, limit = 0, MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for source in sources:
        with tolerance.file():
            found = list(read(source, settings))
            held += sum(sample.image.nbytes + sample.target.nbytes for sample in found)
            if held > limit:
                raise ValueError(
                    f"the images need more than the {limit / 2**30:.1f} GiB that they may take of this machine; "
                    "lower --size, or use fewer"
                )
            yield from found


def _images(
    samples: Iterable[Sample], classes: list[str], what: str, tolerance: Tolerance
) -> Images:
    found = list(samples)
    if not found:
        raise ValueError(
            f"training needs images, got none that can be used and {len(tolerance.skipped)} that were skipped; "
            + (f"the first: {tolerance.skipped[0]}" if tolerance.skipped else "give another folder")
        )
    items = [
        Item(group(s), int(s.target) if not s.target.dim() else 0, s.part, told(s)) for s in found
    ]
    parts = split(items)
    patients = len({s.patient for s in found if s.patient})
    counts = ", ".join(f"{len(getattr(parts, name))} {name}" for name in NAMES)
    of = f" of {patients} patients" if patients else ""
    skipped = f", {len(tolerance.skipped)} bad files skipped" if tolerance.skipped else ""
    description = f"{what}: {len(found)} images{of} ({counts}){skipped}"
    return Images(
        found, shown(found), parts, classes, description, fingerprint(found), tolerance.skipped
    )


def group(sample: Sample) -> str:
    """What is never divided over parts, and resampled as a whole: the images of a patient, equal images."""
    return sample.patient or content(sample)


def told(sample: Sample) -> str:
    """Where a sample is from, for the user's own eyes."""
    return f"{sample.place or 'made'}, image {sample.index}"


def shown(samples: list[Sample]) -> list[str]:
    """What a report calls each sample: the name of a picture, or a number of the patient and of the image."""
    numbers = {
        p: n for n, p in enumerate(dict.fromkeys(s.patient for s in samples if s.patient), 1)
    }
    seen: dict[str | None, int] = {}
    names = []
    for sample in samples:
        seen[sample.patient] = count = seen.get(sample.patient, 0) + 1
        if sample.patient:
            names.append(f"patient {numbers[sample.patient]}, image {count}")
        elif sample.public and sample.place:
            names.append(folders.stem(Path(sample.place)))
        else:
            names.append(f"image {count}")
    return names


def fingerprint(samples: list[Sample]) -> str:
    """A digest of everything that training reads."""
    total = hashlib.sha256()
    for part in chain.from_iterable((s.image, s.target) for s in samples):
        total.update(str(tuple(part.shape)).encode())
        total.update(part.numpy().tobytes())
    return total.hexdigest()
