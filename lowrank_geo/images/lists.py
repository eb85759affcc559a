"""The parts of a split as train.txt, val.txt and test.txt beside the images say."""

from pathlib import Path

from lowrank_geo.images.bad_files import BadFile, Tolerance
from lowrank_geo.images.dicom import digest
from lowrank_geo.images.folders import stem
from lowrank_geo.images.reading import Source
from lowrank_geo.images.splits import NAMES


def listed(sources: list[Source], root: Path, tolerance: Tolerance) -> list[Source]:
    """The sources with the parts that train.txt, val.txt and test.txt name: stems of files, or folders of patients."""
    parts: dict[str, str] = {}
    images = {stem(s.image) for s in sources}
    patients = {s.patient for s in sources}
    for part in NAMES:
        file = root / f"{part}.txt"
        for line in _lines(file) if file.is_file() else ():
            exact = line in images or digest(line) in patients
            name = line if exact else stem(Path(line))
            with tolerance.file():
                if name not in images and digest(name) not in patients:
                    raise BadFile(
                        f"a split needs names of images or of folders of patients, got {line} in {file}, which is none"
                    )
            if parts.setdefault(name, part) != part:
                raise ValueError(
                    f"a split needs every name in one list, got {name} in {parts[name]}.txt and {part}.txt; remove one"
                )
    if not parts:
        return sources
    by_patient = {digest(name): part for name, part in parts.items()}
    return [
        s._replace(part=parts.get(stem(s.image), by_patient.get(s.patient or ""))) for s in sources
    ]


def _lines(file: Path) -> list[str]:
    """The lines of a list that are not empty.

    Raises: ValueError for a file that is no text.
    """
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a list of a split needs to be text in UTF-8, got other bytes in {file}; save it as such"
        ) from error
    return [line.strip() for line in lines if line.strip()]
