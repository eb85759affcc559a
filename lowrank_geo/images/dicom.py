"""One image of a DICOM file, through pydicom. Of all that a header says of a patient, a digest of the ID is kept."""

import hashlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    import pydicom
    from pydicom.errors import BytesLengthException, InvalidDicomError
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "reading DICOM needs the package pydicom, got none; pip install 'lowrank-geo[images]'"
    ) from missing

from lowrank_geo.images.bad_files import BadFile, decoding, regular
from lowrank_geo.images.pictures import MAX_IMAGE_PIXELS
from lowrank_geo.images.windows import AUTOMATIC, window

SUFFIXES = (".dcm", ".dicom")


class DicomImage(NamedTuple):
    """An image in grey levels, and whose it is."""

    pixels: np.ndarray  # (H, W) or (H, W, 3), float32 in [0, 1]
    patient: str | None  # a digest, never an ID


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM files do; many have no suffix."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_dicom(path: Path, window_name: str) -> DicomImage:
    """The image of a file: CT in HU through the window, all others through percentiles of their own.

    Raises: BadFile for a file that is damaged, holds no image, several frames or fewer bytes than it says.
    """
    regular(path)
    with (
        decoding(path, "DICOM", InvalidDicomError, BytesLengthException),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # remarks on the style of a header
        data = pydicom.dcmread(path)
        _check(path, data)
        pixels = _pixels(data, window_name)
        identity = str(data.get("PatientID") or "").strip()
    return DicomImage(pixels, digest(identity) if identity else None)


def digest(identity: str) -> str:
    """What stands for a patient: equal for equal IDs, from which the ID cannot be read off."""
    return hashlib.sha256(b"lowrank_geo patient " + identity.encode()).hexdigest()


def _check(path: Path, data: Any) -> None:
    """Refuse, before anything is allocated, what is too large, has several frames, or is shorter than it says."""
    if "PixelData" not in data:
        raise BadFile(f"a DICOM file needs an image, got no pixel data in {path}")
    rows, columns = int(data.Rows), int(data.Columns)
    frames = int(data.get("NumberOfFrames") or 1)
    if frames != 1:
        raise BadFile(f"a DICOM file needs one frame, got {frames} in {path}")
    if not 0 < rows * columns <= MAX_IMAGE_PIXELS:
        raise BadFile(
            f"an image needs 1 to {MAX_IMAGE_PIXELS:,} pixels, got {columns} x {rows} in {path}"
        )
    if not data.file_meta.TransferSyntaxUID.is_compressed:
        samples = int(data.get("SamplesPerPixel") or 1)
        promised = (rows * columns * samples * int(data.BitsAllocated) + 7) // 8
        held = len(data.PixelData)
        if held < promised:
            raise BadFile(
                f"a DICOM file needs the {promised} bytes of pixels that its header promises, got {held} in {path}"
            )


def _pixels(data: Any, window_name: str) -> np.ndarray:
    kind = str(data.get("PhotometricInterpretation"))
    stored = data.pixel_array
    if stored.ndim == 3:
        if kind.startswith("YBR"):
            stored = pydicom.pixels.convert_color_space(stored, kind, "RGB")
        return stored.astype(np.float32) / (2 ** int(data.BitsStored) - 1)
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    values = stored.astype(np.float64) * float(1 if slope is None else slope)
    values += float(intercept or 0)
    is_ct = data.get("Modality") == "CT"
    grey = window(values, window_name if is_ct else AUTOMATIC)
    return 1 - grey if kind == "MONOCHROME1" else grey
