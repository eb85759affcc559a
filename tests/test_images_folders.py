"""folders, splits, collect: which files belong together, who is in which part, and what is refused."""

import numpy as np
import pytest
import torch
from image_files import NAME, blob, kvasir, noisy, write_dicom, write_nifti, write_png

from lowrank_geo.images import collect
from lowrank_geo.images.bad_files import BadFile
from lowrank_geo.images.reading import Settings
from lowrank_geo.images.splits import Item, split

SMALL = Settings(size=32)


def segmentation(root, settings=SMALL, skip_bad=False):
    return collect.segmentation_folder(root, settings, skip_bad=skip_bad)


def classes(root, skip_bad=False):
    return collect.class_folder(root, SMALL, skip_bad=skip_bad)


def by_patient(root, patients=6, slices=3, kind="png"):
    for patient in range(patients):
        for number in range(slices):
            mask = blob(32, shift=patient)
            folder = root / f"{NAME}-{patient}"
            write_png(folder / "masks" / f"s{number}.png", mask)
            picture = noisy(mask, 10 * patient + number)
            if kind == "png":
                write_png(folder / "images" / f"s{number}.png", picture)
            else:
                file = folder / "images" / f"s{number}.dcm"
                write_dicom(file, picture.astype(np.int16) + 1000, PatientID=f"id {patient}")
    return root


def test_images_and_masks_of_one_name_are_pairs(tmp_path):
    images = segmentation(kvasir(tmp_path))
    assert images.names == [f"case{n:02d}" for n in range(12)] and images.channels == 1
    assert torch.equal(images.samples[3].target, torch.from_numpy(blob(32, -3)))
    assert [len(part) for part in images.split[:3]] == [10, 1, 1]
    assert sorted(sum(images.split[:3], [])) == list(range(12))
    assert images.split.judged_on == "test" and "12 images (10 train, 1 val, 1 test)" in (
        images.description
    )


@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_a_patient_is_in_one_part_and_has_no_name(tmp_path, kind):
    images = segmentation(by_patient(tmp_path, kind=kind))
    parts = [{images.samples[i].patient for i in part} for part in images.split[:3]]
    assert [len(p) for p in parts] == [4, 1, 1] and len(set.union(*parts)) == 6
    assert images.names[4] == "patient 2, image 2"
    assert NAME not in images.description + "".join(images.names)


def test_one_dicom_patient_in_a_flat_folder_stays_together(tmp_path):
    for number in range(12):
        mask = blob(32, shift=number - 6)
        picture = noisy(mask, number).astype(np.int16)
        write_dicom(tmp_path / "images" / f"{NAME}{number}.dcm", picture, PatientID=f"{number % 4}")
        write_png(tmp_path / "masks" / f"{NAME}{number}.png", mask)
    images = segmentation(tmp_path)
    parts = [{images.samples[i].patient for i in part} for part in images.split[:3]]
    assert [len(p) for p in parts] == [2, 1, 1] and "of 4 patients" in images.description
    assert NAME not in "".join(images.names)


def test_lits_volumes_are_slices_by_patient(tmp_path):
    for number in range(4):
        labels = np.zeros((32, 32, 5), np.uint8)
        labels[..., 1:4] = blob(32)[..., None]
        volume = np.full((32, 32, 5), 10 * number, np.int16) + 100 * labels
        write_nifti(tmp_path / f"volume-{number}.nii", volume)
        write_nifti(tmp_path / f"segmentation-{number}.nii.gz", labels)
    images = segmentation(tmp_path)
    assert len(images.samples) == 12 and images.names[3] == "patient 2, image 1"
    assert [len(part) for part in images.split[:3]] == [6, 3, 3]
    (tmp_path / "test.txt").write_text("0\n")
    (tmp_path / "train.txt").write_text("1\n2\n3\n")
    listed = segmentation(tmp_path)
    assert listed.split.test == [0, 1, 2] and len(listed.split.train) == 6


def test_lists_give_the_published_split_and_no_test_means_validation(tmp_path):
    kvasir(tmp_path)
    (tmp_path / "train.txt").write_text("".join(f"case{n:02d}\n" for n in range(9)))
    (tmp_path / "val.txt").write_text("case09.png\ncase10\ncase11\n")
    images = segmentation(tmp_path)
    assert images.split.train == list(range(9)) and images.split.val == [9, 10, 11]
    assert images.split.judged_on == "val" and images.split.test == images.split.val
    (tmp_path / "val.txt").write_text("case08\ncase10\n")
    with pytest.raises(ValueError, match="case08 in train.txt and val.txt"):
        segmentation(tmp_path)
    (tmp_path / "val.txt").write_text("case10\n")
    with pytest.raises(ValueError, match="name every image, got none for .*case09"):
        segmentation(tmp_path)


def test_a_name_that_is_none_stops_or_is_passed_over(tmp_path):
    kvasir(tmp_path)
    lines = "".join(f"case{n:02d}\n" for n in range(12))
    (tmp_path / "train.txt").write_text("\ufeff" + lines + "\n\n", "utf-8")
    (tmp_path / "test.txt").write_text("\ncase77\n")
    with pytest.raises(
        BadFile, match=r"names of images .* got case77 in .*test.txt, which is none"
    ):
        segmentation(tmp_path)
    images = segmentation(tmp_path, skip_bad=True)
    assert "case77" in images.skipped[0] and len(images.split.train) == 11
    (tmp_path / "test.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="text in UTF-8, got other bytes in"):
        segmentation(tmp_path)


def test_a_listed_name_may_hold_dots_and_a_suffix(tmp_path):
    for number in range(4):
        mask = blob(32, number)
        write_png(tmp_path / "images" / f"scan.{number}.png", noisy(mask, number))
        write_png(tmp_path / "masks" / f"scan.{number}.png", mask)
    (tmp_path / "train.txt").write_text("scan.0\nscan.1.png\nscan.2\n")
    (tmp_path / "test.txt").write_text("scan.3\n")
    assert segmentation(tmp_path).split.test == [3]


def test_folders_called_train_and_val_are_the_split(tmp_path):
    kvasir(tmp_path / "train", 6)
    for number in range(2):
        mask = blob(32, number)
        write_png(tmp_path / "valid" / "images" / f"v{number}.png", noisy(mask, 90 + number))
        write_png(tmp_path / "valid" / "masks" / f"v{number}.png", mask)
    assert [len(part) for part in segmentation(tmp_path).split[:2]] == [6, 2]
    copy = (tmp_path / "train" / "images" / "case01.png").read_bytes()
    (tmp_path / "valid" / "images" / "v0.png").write_bytes(copy)
    with pytest.raises(ValueError, match=r"in one part .*case01.* in train and .*v0.* in val"):
        segmentation(tmp_path)


def test_a_patient_in_two_parts_is_refused(tmp_path):
    by_patient(tmp_path / "train", 4)
    by_patient(tmp_path / "test", 1)  # the first patient again
    with pytest.raises(ValueError, match="in test and .* in train, which are of the same"):
        segmentation(tmp_path)


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path):
    for label, name in enumerate(["<b>polyp</b>".replace("/", "∕"), "normal"]):
        for number in range(10):
            seed = 100 * label + number
            write_png(tmp_path / name / f"{number}.png", noisy(blob(32, label), seed))
    images = classes(tmp_path)
    assert images.classes == ["<b>polyp<∕b>", "normal"]
    assert [int(s.target) for s in images.samples] == [0] * 10 + [1] * 10
    for part in images.split[:3]:  # each part has both classes
        assert {int(images.samples[i].target) for i in part} == {0, 1}


def test_class_folders_may_hold_patients(tmp_path):
    for name in "ab":
        for patient in range(4):
            for number in range(2):
                seed = number_of(name, patient, number)
                folder = tmp_path / name / f"{NAME}{patient}{name}"
                write_png(folder / f"{number}.png", noisy(blob(32), seed))
    images = classes(tmp_path)
    parts = [{images.samples[i].patient for i in part} for part in images.split[:3]]
    assert [len(p) for p in parts] == [4, 2, 2] and NAME not in "".join(images.names)


def number_of(name, patient, number):
    return 100 * ord(name) + 10 * patient + number


@pytest.mark.parametrize("folders", [[], ["only"]])
def test_one_class_is_refused(tmp_path, folders):
    for name in folders:
        write_png(tmp_path / name / "a.png", noisy(blob(32)))
    with pytest.raises(ValueError, match=f"two classes or more, got {len(folders)} in"):
        classes(tmp_path)


def test_a_class_without_images_or_with_too_few_is_named(tmp_path):
    for number in range(5):
        write_png(tmp_path / "a" / f"{number}.png", noisy(blob(32), number))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="got none in .*b; remove"):
        classes(tmp_path)
    write_png(tmp_path / "b" / "x.png", noisy(blob(32), 9))
    with pytest.raises(ValueError, match="at least 3 patients or different images .* got 1 of"):
        classes(tmp_path)


def test_masks_of_one_class_are_refused(tmp_path):
    kvasir(tmp_path)
    for file in (tmp_path / "masks").iterdir():
        write_png(file, np.zeros((32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"masks of two classes or more .* got only \{0\}"):
        segmentation(tmp_path)


BAD = {
    "no mask": (lambda root: (root / "masks" / "case03.png").unlink(), "a mask of the same name"),
    "no image": (lambda root: (root / "images" / "case03.png").unlink(), "an image of the same"),
    "cut": (lambda root: cut(root / "images" / "case03.png"), "whole and valid"),
    "size": (lambda root: write_png(root / "masks" / "case03.png", blob(31)), "32 x 32, got 31"),
    "values": (lambda root: write_png(root / "masks" / "case03.png", 7 * blob(32)), "got 0, 7"),
    "kind": (lambda root: (root / "images" / "case03.png").rename(root / "images" / "case03.tif"),
             "PNG, JPEG, DICOM or NIfTI"),
    "twice": (lambda root: (root / "images" / "case03.jpg").write_bytes(b""), "name of its own"),
}  # fmt: skip


def cut(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named_and_skipped_only_if_asked(tmp_path, what):
    spoil, said = BAD[what]
    spoil(kvasir(tmp_path))
    with pytest.raises(BadFile, match=said) as error:
        segmentation(tmp_path)
    assert "case03" in str(error.value) and "\n" not in str(error.value)
    assert "--skip-bad" in str(error.value)
    images = segmentation(tmp_path, skip_bad=True)
    assert len(images.samples) == 11 and "case03" not in images.names
    assert len(images.skipped) == 1 and "case03" in images.skipped[0]
    assert "1 bad files skipped" in images.description


def test_nothing_but_bad_files_is_refused(tmp_path):
    kvasir(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none that can be used and 12 that were skipped"):
        segmentation(tmp_path, skip_bad=True)


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_a_folder_that_is_none_is_refused(tmp_path, kind):
    root = tmp_path / "data"
    if kind == "file":
        root.write_text("")
    if kind == "empty":
        root.mkdir()
    with pytest.raises(ValueError, match=f"at {root}|got none of them in {root}"):
        segmentation(root)


def test_grey_and_coloured_images_may_be_mixed(tmp_path):
    kvasir(tmp_path)
    picture = np.stack([noisy(blob(32))] * 3, -1)
    write_png(tmp_path / "images" / "case05.png", picture)
    assert segmentation(tmp_path).channels == 3


def test_phantoms_and_digits_need_no_files():
    images = collect.phantoms(SMALL, difficulty="easy", seed=0, patients=10)
    assert len(images.samples) == 10 * collect.SLICES and images.classes[1] == "organ"
    assert [len(part) for part in images.split[:3]] == [48, 6, 6]
    again = collect.phantoms(SMALL, difficulty="easy", seed=0, patients=10)
    assert again.fingerprint == images.fingerprint
    with pytest.raises(ValueError, match="got 4"):
        collect.phantoms(Settings(classes=4), difficulty="easy", seed=0)
    found = collect.digits()
    assert len(found.samples) == 1797 and found.samples[0].image.shape == (1, 8, 8)
    assert sum(len(part) for part in found.split[:3]) == 1797


def test_a_split_keeps_groups_and_takes_a_tenth_of_each_label():
    items = [Item(f"g{n // 3}", label=int(n >= 150)) for n in range(300)]
    parts = split(items)
    groups = [{items[i].group for i in part} for part in parts[:3]]
    assert [len(g) for g in groups] == [80, 10, 10] and len(set.union(*groups)) == 100
    for part in parts[1:3]:
        assert sum(items[i].label for i in part) == len(part) / 2
    assert split(items) == parts
