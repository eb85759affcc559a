"""Readers of PNG, JPEG, DICOM and NIfTI, on files written here: what they hold, and one sentence for what is wrong."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from image_files import NAME, blob, lying_nifti, noisy, write_dicom, write_nifti, write_png
from PIL import Image

from lowrank_geo.images import pictures
from lowrank_geo.images.bad_files import BadFile
from lowrank_geo.images.dicom import read_dicom
from lowrank_geo.images.masks import classes_of, classes_of_volume
from lowrank_geo.images.nifti import read_volume
from lowrank_geo.images.pictures import read_labels, read_picture
from lowrank_geo.images.reading import Settings, Source, read
from lowrank_geo.images.windows import window

GREY = noisy(blob(16))


def one_sentence(error, path):
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert NAME not in str(error.value)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "1", "P"])
def test_a_png_of_any_mode_is_grey_or_coloured(tmp_path, mode):
    image = Image.fromarray(GREY).convert(mode)
    image.save(tmp_path / "a.png")
    pixels = read_picture(tmp_path / "a.png")
    assert pixels.dtype == np.float32 and 0 <= pixels.min() <= pixels.max() <= 1
    assert pixels.shape == ((16, 16) if mode in ("L", "LA", "1") else (16, 16, 3))
    if mode in ("L", "RGB"):
        assert np.array_equal(np.atleast_3d(pixels)[..., 0], GREY / np.float32(255))


def test_16_bits_keep_their_range(tmp_path):
    write_png(tmp_path / "a.png", np.array([[0, 65535], [6553, 32768]], np.uint16))
    assert np.allclose(read_picture(tmp_path / "a.png"), [[0, 1], [0.1, 0.5]], atol=1e-4)


def test_a_jpeg_is_read_and_its_orientation_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(np.tile(GREY, (1, 2))).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").shape == (32, 16)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("kept", [0, 1, 8, 20, 40, 0.5, 0.9])
def test_a_truncated_picture_is_named(tmp_path, name, kept):
    path = tmp_path / name
    Image.fromarray(np.tile(GREY, (4, 4))).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    for reader in (read_picture, read_labels):
        with pytest.raises(BadFile, match="whole and valid") as error:
            reader(path)
        one_sentence(error, path)


def test_flipped_bytes_raise_nothing_but_bad_file(tmp_path):
    """400 files with three changed bytes each: read or refused, never another exception."""
    write_png(tmp_path / "a.png", GREY)
    Image.fromarray(GREY).save(tmp_path / "a.jpg")
    write_dicom(tmp_path / "a.dcm", GREY.astype(np.int16))
    write_nifti(tmp_path / "a.nii", np.zeros((4, 4, 3), np.int16))
    readers = {
        "a.png": read_picture,
        "a.jpg": read_picture,
        "a.dcm": lambda path: read_dicom(path, "abdomen"),
        "a.nii": read_volume,
    }
    draw, refused = np.random.default_rng(0), 0
    for name, reader in readers.items():
        whole = (tmp_path / name).read_bytes()
        for _ in range(100):
            damaged = bytearray(whole)
            for place in draw.integers(0, min(len(whole), 700), 3):
                damaged[place] = draw.integers(0, 256)
            (tmp_path / ("bad" + name)).write_bytes(damaged)
            try:
                reader(tmp_path / ("bad" + name))
            except BadFile:
                refused += 1
    assert 50 < refused < 400


def png_of(width, height):
    """A PNG file that promises width × height pixels and holds none."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [9000, 60_000])
def test_an_image_bomb_is_refused_by_its_header(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(side, side))
    with pytest.raises(BadFile, match=r"at most 67,108,864 pixels|whole and valid") as error:
        read_picture(path)
    one_sentence(error, path)


def test_only_png_and_jpeg_decoders_can_be_reached(tmp_path):
    for kind in ("GIF", "TIFF", "BMP", "PPM"):
        stream = io.BytesIO()
        Image.fromarray(GREY).save(stream, kind)
        (tmp_path / "a.png").write_bytes(stream.getvalue())
        with pytest.raises(BadFile):
            read_picture(tmp_path / "a.png")
    assert pictures.FORMATS == ("PNG", "JPEG")


def test_masks_are_0_and_1_or_black_and_white(tmp_path):
    mask = blob(16)
    for stored in (mask, mask * 255):
        path = write_png(tmp_path / "m.png", stored)
        assert np.array_equal(classes_of(read_labels(path), 2, path), mask)
    big = blob(64)
    Image.fromarray(np.stack([big * 255] * 3, -1)).save(tmp_path / "m.jpg", quality=90)
    labels = read_labels(tmp_path / "m.jpg")
    assert len(np.unique(labels)) > 2  # compression left its traces
    assert (classes_of(labels, 2, tmp_path) != big).mean() < 0.01


def test_edges_that_strong_compression_greyed_are_one_side_or_the_other(tmp_path):
    big, path = blob(256), tmp_path / "m.jpg"
    Image.fromarray(big * 255).save(path, quality=20)
    labels = read_labels(path)
    assert ((labels > 64) & (labels < 191)).any()
    assert (classes_of(labels, 2, path) != big).mean() < 0.01
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (8, 1))).save(path)
    with pytest.raises(BadFile, match="0 and 1, or 0 and 255"):
        classes_of(read_labels(path), 2, path)


@pytest.mark.parametrize(
    "labels, classes, said",
    [
        ([[0, 1, 2]], 2, "the values 0 and 1, or 0 and 255, got 0, 1, 2 in"),
        ([[0, 100, 255]], 2, "got 0, 100, 255 in"),
        ([[0, 3]], 3, "of 3 classes needs the values 0 to 2, got 0, 3 in"),
        ([[0, 255]], 4, "the values 0 to 3, got 0, 255 in"),
        ([[0, 30]], 2, "got 0, 30 in"),
    ],
)
def test_refuses_values_that_no_mask_has(tmp_path, labels, classes, said):
    with pytest.raises(BadFile, match=said) as error:
        classes_of(np.array(labels), classes, tmp_path / "m.png")
    one_sentence(error, tmp_path / "m.png")


def test_a_volume_of_masks_has_whole_numbers(tmp_path):
    assert classes_of_volume(np.array([0.0, 1.0, 2.0]), 2, tmp_path).tolist() == [0, 1, 1]
    assert classes_of_volume(np.array([0, 1, 2]), 3, tmp_path).tolist() == [0, 1, 2]
    for bad in ([0.5, 1.0], [-1.0, 0.0]):
        with pytest.raises(BadFile, match="whole numbers from 0 on"):
            classes_of_volume(np.array(bad), 2, tmp_path)


def test_a_coloured_mask_is_refused(tmp_path):
    path = write_png(tmp_path / "m.png", np.stack([GREY, 0 * GREY, GREY], -1))
    with pytest.raises(BadFile, match="colours in"):
        read_labels(path)


@pytest.mark.parametrize("rle", [False, True])
def test_dicom_is_in_hounsfield_units_through_the_window(tmp_path, rle):
    stored = np.array([[1024 - 160, 1024 + 40], [1024 + 240, 1024 + 2000]], np.int16)
    found = read_dicom(write_dicom(tmp_path / "a.dcm", stored, rle=rle), "abdomen")
    assert np.allclose(found.pixels, [[0, 0.5], [1, 1]])
    assert found.patient and "4711" not in found.patient


def test_dicom_of_another_modality_is_stretched_and_monochrome1_inverted(tmp_path):
    ramp = np.arange(256, dtype=np.int16).reshape(16, 16)
    plain = read_dicom(write_dicom(tmp_path / "a.dcm", ramp, Modality="MR"), "abdomen").pixels
    tags = {"Modality": "MR", "PhotometricInterpretation": "MONOCHROME1"}
    inverted = read_dicom(write_dicom(tmp_path / "b.dcm", ramp, **tags), "abdomen").pixels
    assert plain.min() == 0 and plain.max() == 1 and np.allclose(plain, 1 - inverted)


@pytest.mark.parametrize(
    "tags, said",
    [
        (
            {"Rows": 600, "Columns": 600},
            "the 720000 bytes of pixels that its header promises, got 512",
        ),
        ({"Rows": 60000, "Columns": 60000}, "pixels, got 60000 x 60000"),
        ({"NumberOfFrames": 3}, "one frame, got 3"),
        ({"Rows": 0}, "pixels, got 16 x 0"),
    ],
)
def test_a_dicom_header_that_promises_too_much_is_refused(tmp_path, tags, said):
    path = write_dicom(tmp_path / "a.dcm", GREY.astype(np.int16), **tags)
    with pytest.raises(BadFile, match=said) as error:
        read_dicom(path, "abdomen")
    one_sentence(error, path)


@pytest.mark.parametrize("kept", [0, 100, 140, 400, -30])
def test_a_truncated_dicom_file_is_named(tmp_path, kept):
    path = write_dicom(tmp_path / "a.dcm", GREY.astype(np.int16))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadFile) as error:
        read_dicom(path, "abdomen")
    one_sentence(error, path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_volume_is_what_was_written(tmp_path, name):
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    found, affine = read_volume(write_nifti(tmp_path / name, values))
    assert np.array_equal(found, values) and affine[2, 2] == 2


@pytest.mark.parametrize("shape", [(2000, 2000, 20), (500, 500, 500), (30_000, 30_000, 30_000)])
def test_a_compressed_header_that_promises_too_much_is_refused(tmp_path, shape):
    path = lying_nifti(tmp_path / "a.nii.gz", shape)
    with pytest.raises(BadFile, match="that its header promises|voxels, got") as error:
        read_volume(path)
    one_sentence(error, path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_truncated_volume_is_named(tmp_path, name, share):
    values = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 10)).astype(np.int16)
    path = write_nifti(tmp_path / name, values)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(BadFile) as error:
        read_volume(path)
    one_sentence(error, path)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2, 3)])
def test_refuses_what_is_no_volume(tmp_path, shape):
    with pytest.raises(BadFile, match="three dimensions"):
        read_volume(write_nifti(tmp_path / "a.nii", np.zeros(shape, np.int16)))


def test_a_volume_becomes_slices_with_the_organ(tmp_path):
    labels = np.zeros((6, 8, 4), np.int16)
    labels[1:3, 2:5, 1:3] = 1
    labels[1, 2, 2] = 2
    volume = np.where(labels, 100, -100).astype(np.int16)
    source = Source(
        write_nifti(tmp_path / "v.nii", volume), write_nifti(tmp_path / "s.nii.gz", labels)
    )
    found = list(read(source, Settings(size=8)))
    assert [s.index for s in found] == [1, 2] and len({s.patient for s in found}) == 1
    assert found[0].image.shape == (1, 8, 8) and found[0].image.dtype == torch.uint8
    # Rows run along the second axis, columns along the first, stretched from 6 to 8.
    assert found[0].target[2:5].sum() == found[0].target.sum() and found[1].target.max() == 1
    assert [s.index for s in read(source, Settings(size=8, empty=True))] == [0, 1, 2, 3]
    assert max(int(s.target.max()) for s in read(source, Settings(size=8, classes=3))) == 2


@pytest.mark.parametrize("wrong", ["shape", "place", "kind", "missing"])
def test_a_mask_that_does_not_fit_its_volume_is_named(tmp_path, wrong):
    image = write_nifti(tmp_path / "v.nii", np.zeros((4, 4, 3), np.int16))
    labels = np.zeros((4, 4, 2 if wrong == "shape" else 3), np.int16)
    affine = np.diag([0.8, 0.8, 5, 1]) if wrong == "place" else None
    mask = write_nifti(tmp_path / "s.nii", labels, affine)
    if wrong == "kind":
        mask = write_png(tmp_path / "s.png", GREY)
    if wrong == "missing":
        mask = tmp_path / "none.nii"
    with pytest.raises(BadFile) as error:
        list(read(Source(image, mask), Settings()))
    one_sentence(error, mask)


def test_a_mask_of_another_size_is_named(tmp_path):
    image, mask = write_png(tmp_path / "a.png", GREY), write_png(tmp_path / "b.png", blob(8))
    with pytest.raises(BadFile, match="16 x 16, got 8 x 8") as error:
        list(read(Source(image, mask), Settings()))
    one_sentence(error, mask)


def test_windows_are_centre_and_width():
    assert window(np.array([-45.0, 30, 105, np.nan, np.inf]), "liver").tolist() == [0, 0.5, 1, 0, 1]
    assert window(np.zeros(4), "percentiles").tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="abdomen, liver, lung, bone, percentiles, got 'brain'"):
        window(np.zeros(4), "brain")


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadFile, match="no regular file at"):
        read_picture(tmp_path / "a.png")
