"""Which files of a folder belong together: images with masks, by patient or not, or images by class.

A folder of training data is one of

    images/a.png + masks/a.png          Kvasir-SEG; also volumes, images/a.nii.gz + masks/a.nii.gz
    PATIENT/images/… + PATIENT/masks/…  slices by patient
    volume-0.nii + segmentation-0.nii   LiTS
    CLASS/a.png, CLASS/PATIENT/a.png    classification

or holds such folders under the names train, val and test.
"""

from collections.abc import Iterator
from pathlib import Path

from lowrank_geo.images.bad_files import BadFile, Tolerance
from lowrank_geo.images.dicom import digest
from lowrank_geo.images.reading import Source, is_volume

PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
IGNORED = (
    ".txt",
    ".csv",
    ".json",
    ".md",
    ".html",
    ".pdf",
    ".db",
    ".ini",
)  # what lies beside images


def segmentation_sources(root: Path, tolerance: Tolerance) -> list[Source]:
    """Images with their masks, in the order of their names.

    Raises: ValueError for a folder of another layout; BadFile for an image without a mask or a mask without an image.
    """
    parts = _parts(root)
    if parts:
        return [
            s._replace(part=part) for part, folder in parts for s in _pairs_in(folder, tolerance)
        ]
    return list(_pairs_in(root, tolerance))


def class_sources(root: Path, tolerance: Tolerance) -> tuple[list[Source], list[str]]:
    """Images with their labels, and the names of the classes in the order of the labels.

    Raises: ValueError unless there are two folders of classes or more.
    """
    places = _parts(root) or [(None, root)]
    names = sorted({folder.name for _, place in places for folder in _folders(place)})
    if len(names) < 2:
        raise ValueError(
            f"classification needs a folder for each of two classes or more, got {len(names)} in {root}; "
            "give a folder of class folders"
        )
    sources = []
    for part, place in places:
        for folder in _folders(place):
            label = names.index(folder.name)
            for patient, inside in [
                (None, folder),
                *((digest(f.name), f) for f in _folders(folder)),
            ]:
                sources += [Source(f, None, label, patient, part) for f in _files(inside)]
    with_image = {source.label for source in sources}
    for label, name in enumerate(names):
        if label not in with_image:
            raise ValueError(
                f"classification needs images of every class, got none in {root / name}; remove the folder"
            )
    return sources, names


def _parts(root: Path) -> list[tuple[str | None, Path]]:
    if not root.is_dir():
        raise ValueError(
            f"--data needs a folder, got {'a file' if root.exists() else 'nothing'} at {root}; give one"
        )
    found = [(PARTS[f.name.lower()], f) for f in _folders(root) if f.name.lower() in PARTS]
    return list(found) if any(part == "train" for part, _ in found) else []


def _pairs_in(root: Path, tolerance: Tolerance) -> Iterator[Source]:
    if _has_pairs(root):
        yield from _pairs(_by_name(root / "images"), _by_name(root / "masks"), root, tolerance)
        return
    patients = [folder for folder in _folders(root) if _has_pairs(folder)]
    for folder in patients:
        pairs = _pairs(_by_name(folder / "images"), _by_name(folder / "masks"), folder, tolerance)
        yield from (pair._replace(patient=digest(folder.name)) for pair in pairs)
    if patients:
        return
    volumes = {stem(f): f for f in _files(root) if is_volume(f)}
    images, masks = (
        {n.removeprefix(kind): [f] for n, f in volumes.items() if n.startswith(kind)}
        for kind in ("volume-", "segmentation-")
    )
    if not images:
        raise ValueError(
            f"segmentation needs images/ and masks/, folders of patients with these, or volume-N.nii beside "
            f"segmentation-N.nii, got none of them in {root}; arrange the files like this"
        )
    yield from _pairs(images, masks, root, tolerance)


def _has_pairs(root: Path) -> bool:
    return (root / "images").is_dir() and (root / "masks").is_dir()


def _pairs(
    images: dict[str, list[Path]], masks: dict[str, list[Path]], root: Path, tolerance: Tolerance
) -> Iterator[Source]:
    """One source for each name; names must be in both, once."""
    for name in sorted(images.keys() | masks.keys()):
        with tolerance.file():
            here, there = images.get(name, []), masks.get(name, [])
            if len(here) > 1 or len(there) > 1:
                twice = here if len(here) > 1 else there
                raise BadFile(
                    f"an image needs a name of its own, got both {twice[0].name} and {twice[1]}"
                )
            if not there:
                raise BadFile(f"an image needs a mask of the same name, got none for {here[0]}")
            if not here:
                raise BadFile(f"a mask needs an image of the same name, got none for {there[0]}")
            patient = digest(name) if is_volume(here[0]) else None
            yield Source(here[0], there[0], patient=patient)


def _by_name(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in _files(folder):
        found.setdefault(stem(file), []).append(file)
    return found


def stem(file: Path) -> str:
    """A file's name without its suffix, .nii.gz being one."""
    return file.name[:-7] if file.name.lower().endswith(".nii.gz") else file.stem


def _files(folder: Path) -> list[Path]:
    """What may be images, in the order of the names."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.is_dir()
        and not entry.name.startswith(".")
        and entry.suffix.lower() not in IGNORED
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
