"""Image files of every kind, written by the tests that read them."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless

NAME = "Doe^John"


def blob(size: int = 32, shift: int = 0) -> np.ndarray:
    """A mask of a disc. Shapes: -> (size, size), uint8 of 0 and 1."""
    y, x = np.mgrid[:size, :size] - size / 2
    return ((x - shift) ** 2 + y**2 < (size / 4) ** 2).astype(np.uint8)


def noisy(mask: np.ndarray, seed: int = 0) -> np.ndarray:
    """A grey picture of a mask. Shapes: (H, W) -> (H, W), uint8."""
    noise = np.random.default_rng(seed).integers(0, 90, mask.shape)
    return (mask * 150 + noise).astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_dicom(path: Path, stored: np.ndarray, *, rle: bool = False, **tags: object) -> Path:
    """A CT image of `stored` values, with the name of a patient; `tags` replace or add to the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[path.name])
    data = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PatientName, data.PatientID = "CT", NAME, "4711"
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = stored.astype("<i2").tobytes()
    for tag, value in tags.items():
        setattr(data, tag, value)
    if rle:
        data.compress(RLELossless)
    data.save_as(path, enforce_file_format=True)
    return path


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.diag([0.8, 0.8, 2, 1]) if affine is None else affine)
    nibabel.save(image, path)
    return path


def lying_nifti(path: Path, shape: tuple[int, int, int]) -> Path:
    """A compressed file of a few bytes whose header promises a volume of `shape`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).header
    header.set_data_shape(shape)
    header["vox_offset"] = 352
    path.write_bytes(gzip.compress(header.binaryblock + b"\0" * 4))
    return path


def kvasir(root: Path, count: int = 12, size: int = 32) -> Path:
    """A folder of images/ and masks/."""
    for number in range(count):
        mask = blob(size, shift=number - count // 2)
        write_png(root / "images" / f"case{number:02d}.png", noisy(mask, number))
        write_png(root / "masks" / f"case{number:02d}.png", mask * 255)
    return root
