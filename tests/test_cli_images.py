"""segment and classify as commands: what they print, one sentence and code 2 for bad input, nothing left behind."""

import numpy as np
import pytest
from image_files import blob, lying_nifti, noisy, write_dicom, write_nifti, write_png
from image_runs import FLAGS, by_class, pairs
from test_images_readers import png_of

from lowrank_geo.train.run_folder import read_record


def refused(call, tmp_path, *arguments, said):
    code, _, error = call(*arguments, "--out", "new")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for part in said:
        assert part in error, (part, error)
    assert not (tmp_path / "new").exists()


def test_segment_then_everything_else(call, tmp_path):
    data = pairs(tmp_path / "data")
    code, out, error = call("segment", "--data", "data", *FLAGS, "--budget", 0.5)
    run = tmp_path / "runs" / "1"
    assert code == 0 and error == ""
    assert "layers low-rank" in out and "epoch 1: validation loss" in out
    assert "images/s" in out and "test images, epoch" in out and "dice 0." in out
    assert f"report: {run / 'report.html'}" in out
    assert read_record(run)["config"]["data"] == str(data)

    code, out, _ = call("inspect", run)
    assert code == 0 and "parameters" in out
    code, out, _ = call("segment", "--resume", run)
    assert code == 0 and "resumed at step 9" in out
    for arguments, said in (
        (["segment", "--resume", run, "--gamma", 0.5], "got --gamma 0.5 where it has 0.9"),
        (["segment", "--resume", run, "--out", "other"], "neither --out nor --overwrite"),
        (["classify", "--resume", run], "which segment made; use lowrank-geo segment"),
        (["pretrain", "--resume", run], "which segment made; use lowrank-geo segment"),
        (["generate", run], "which segment made"),
        (["segment", "--data", "data", *FLAGS, "--out", run], "which exists"),
    ):
        code, _, error = call(*arguments)
        assert code == 2 and said in error and error.count("\n") == 1
    assert call("segment", "--data", "data", *FLAGS, "--out", run, "--overwrite")[0] == 0


def test_classify_reads_class_folders(call, tmp_path):
    by_class(tmp_path / "data")
    code, out, error = call("classify", "--data", "data", *FLAGS, "--out", "cls")
    assert code == 0 and error == "" and "accuracy" in out
    assert read_record(tmp_path / "cls")["data"]["classes"] == ["dark", "light"]


def test_tensorboard_gets_the_scores(call, tmp_path):
    pairs(tmp_path / "data")
    assert call("segment", "--data", "data", *FLAGS, "--tensorboard", "--out", "seg")[0] == 0
    [events] = (tmp_path / "seg" / "tensorboard").iterdir()
    assert b"eval/dice" in events.read_bytes()


def test_the_digits_need_no_data(call, tmp_path):
    options = ["--width", 2, "--blocks", 1, "--epochs", 1, "--batch", 256, "--device", "cpu"]
    code, out, _ = call("classify", *options, "--out", "cls")
    assert code == 0 and "accuracy" in out
    assert "1797 images" in read_record(tmp_path / "cls")["data"]["description"]


def test_the_phantoms_need_no_data(call, tmp_path):
    options = ["--size", 16, "--width", 2, "--depth", 1, "--epochs", 1, "--batch", 32]
    code, out, _ = call("segment", *options, "--device", "cpu", "--classes", 3, "--out", "seg")
    assert code == 0 and "dice" in out
    record = read_record(tmp_path / "seg")
    assert record["data"]["classes"] == ["background", "organ", "lesion"]
    assert "medium phantoms" in record["data"]["description"]


def spoil_size(root):
    write_png(root / "masks" / "case03.png", blob(15))


def spoil_values(root):
    write_png(root / "masks" / "case03.png", 7 * blob(16))


def spoil_cut(root):
    path = root / "images" / "case03.png"
    path.write_bytes(path.read_bytes()[:60])


def spoil_bomb(root):
    (root / "images" / "case03.png").write_bytes(png_of(9000, 9000))


def spoil_dicom(root):
    (root / "images" / "case03.png").unlink()
    picture = noisy(blob(16)).astype(np.int16)
    write_dicom(root / "images" / "case03.dcm", picture, Rows=600, Columns=600)


def spoil_nifti(root):
    for folder in ("images", "masks"):
        (root / folder / "case03.png").unlink()
    lying_nifti(root / "images" / "case03.nii.gz", (2000, 2000, 20))
    write_nifti(root / "masks" / "case03.nii.gz", np.zeros((4, 4, 2), np.uint8))


def spoil_name(root):
    (root / "masks" / "case03.png").rename(root / "masks" / "case99.png")


BAD = {
    spoil_size: ["case03.png", "16 x 16, got 15 x 15"],
    spoil_values: ["case03.png", "0 and 1, or 0 and 255, got 0, 7"],
    spoil_cut: ["case03.png", "whole and valid"],
    spoil_bomb: ["case03.png", "at most 67,108,864 pixels, got 9000 x 9000"],
    spoil_dicom: ["case03.dcm", "720000 bytes of pixels that its header promises"],
    spoil_nifti: ["case03.nii.gz", "bytes of voxels that its header promises"],
    spoil_name: ["case03.png", "a mask of the same name"],
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_a_bad_file_stops_the_command_or_is_skipped(call, tmp_path, spoil):
    spoil(pairs(tmp_path / "data"))
    refused(call, tmp_path, "segment", "--data", "data", *FLAGS, said=[*BAD[spoil], "--skip-bad"])
    code, out, _ = call("segment", "--data", "data", *FLAGS, "--skip-bad", "--out", "new")
    assert code == 0 and out.count("passed over: ") == (2 if spoil is spoil_name else 1)
    assert BAD[spoil][0] in out
    assert BAD[spoil][0] not in (tmp_path / "new" / "report.html").read_text()


def test_folders_that_cannot_be_used_are_refused(call, tmp_path):
    by_class(tmp_path / "one")
    for file in (tmp_path / "one" / "light").iterdir():
        file.unlink()
    (tmp_path / "one" / "light").rmdir()
    refused(call, tmp_path, "classify", "--data", "one", *FLAGS, said=["two classes or more, got 1"])  # fmt: skip
    refused(call, tmp_path, "segment", "--data", "none", *FLAGS, said=["got nothing at", "none"])
    data = pairs(tmp_path / "data")
    for file in (data / "masks").iterdir():
        write_png(file, np.zeros((16, 16), np.uint8))
    refused(call, tmp_path, "segment", "--data", "data", *FLAGS, said=["two classes or more"])


def test_a_patient_in_two_parts_is_refused(call, tmp_path):
    for part in ("train", "test"):
        for number in range(3):
            mask, name = blob(16, number), f"{part}{number}.png"
            write_png(tmp_path / "data" / part / "patient 1" / "images" / name, noisy(mask, number))
            write_png(tmp_path / "data" / part / "patient 1" / "masks" / name, mask)
    said = ["in train", "in test", "of the same; move one"]
    refused(call, tmp_path, "segment", "--data", "data", *FLAGS, said=said)


@pytest.mark.parametrize("gamma", ["1", "-0.5", "nan", "2"])
def test_a_gamma_outside_is_refused_before_anything_is_read(call, tmp_path, gamma):
    for command in ("segment", "classify"):
        arguments = command, "--data", "none", "--gamma", gamma
        refused(call, tmp_path, *arguments, said=["--gamma to be at least 0 and below 1"])
