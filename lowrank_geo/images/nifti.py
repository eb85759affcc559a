"""Volumes in NIfTI files, through nibabel, as stacks of transverse slices."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

try:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, ImageDataError
    from nibabel.wrapstruct import WrapStructError
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "reading NIfTI needs the package nibabel, got none; pip install 'lowrank-geo[images]'"
    ) from missing

from lowrank_geo.images.bad_files import BadFile, decoding, regular

SUFFIXES = (".nii", ".nii.gz")
MAX_VOXELS = 2**30
OWN_ERRORS = (HeaderDataError, ImageDataError, ImageFileError, WrapStructError)
DEFLATE = 1032  # the most that one compressed byte can grow to


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The values of a volume, scaled as its header says, and the matrix from voxels to mm.

    Shapes: -> (X, Y, Z) float32 or an integer type, (4, 4).
    Raises: BadFile for a file that is damaged, not three-dimensional, or holds less than its header promises.
    """
    size = regular(path)
    with decoding(path, "NIfTI", *OWN_ERRORS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Any = nibabel.load(path, mmap=False)
        if not isinstance(image, nibabel.Nifti1Image | nibabel.Nifti2Image):
            raise BadFile(f"a volume needs to be NIfTI, got {type(image).__name__} in {path}")
        _check(path, image, size)
        values = np.asanyarray(image.dataobj)
        if values.dtype.kind not in "iuf":
            raise BadFile(f"a volume needs real numbers, got {values.dtype} in {path}")
        small = values.dtype.kind in "iu" and values.dtype.itemsize <= 4
        return values.reshape(values.shape[:3]) if small else _real(values), image.affine


def _real(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).reshape(values.shape[:3])


def _check(path: Path, image: Any, size: int) -> None:
    """Refuse, before anything is allocated, what the file cannot hold."""
    shape = image.shape
    if len(shape) < 3 or math.prod(shape[3:]) != 1 or min(shape) < 1:
        raise BadFile(f"a volume needs three dimensions, got {shape} in {path}")
    if math.prod(shape) > MAX_VOXELS:
        raise BadFile(f"a volume needs at most {MAX_VOXELS:,} voxels, got {shape} in {path}")
    promised = math.prod(shape) * image.header.get_data_dtype().itemsize
    growth = DEFLATE if path.name.endswith(".gz") else 1
    offset = int(image.dataobj.offset)
    if promised + offset > size * growth:
        raise BadFile(
            f"a NIfTI file needs the {promised} bytes of voxels that its header promises, "
            f"got {size} bytes{' compressed' if growth > 1 else ''} in {path}"
        )


def transverse(volume: np.ndarray) -> np.ndarray:
    """Slices as images are drawn: the third axis first, then rows from front to back.

    Shapes: (X, Y, Z) -> (Z, Y, X), a view.
    """
    return volume.transpose(2, 1, 0)
