"""The report of a run on images: complete, self-contained, escaped, and without the name of a patient."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from image_files import NAME, blob, noisy, write_dicom, write_nifti, write_png
from image_runs import SMALL, by_class, pairs
from PIL import Image

from lowrank_geo.images import figures, overlays
from lowrank_geo.images.config import ClassifyConfig, SegmentConfig
from lowrank_geo.images.report import write_report
from lowrank_geo.images.run import train
from lowrank_geo.train.run_folder import RunFolder

EVIL = '<img src=x onerror="alert(1)">&'


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(run):
    page = (run / "report.html").read_text()
    return page, Reader(page)


def check_self_contained(page, found):
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#"))
    assert "://" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)
    assert "default-src 'none'" in page and "img-src data:" in page


def test_segmentation_shows_scores_curves_and_the_worst_cases_first(tmp_path):
    data = pairs(tmp_path / "data", 40)
    run = train(SegmentConfig(data=str(data), **SMALL), tmp_path / "run")
    page, found = read(run)
    check_self_contained(page, found)
    for told in ("Dice", "mIoU", "recall", "precision", "95 % interval", "Confusions", "finished"):
        assert told in found.text
    dices = [float(x) for x in re.findall(r"case\d\d: Dice ([\d.]+)", page)]
    assert len(dices) == 2 * 4 and dices == sorted(dices)  # alternative text and caption
    assert str(tmp_path) not in page


def test_classification_shows_truth_and_prediction(tmp_path):
    data = by_class(tmp_path / "data", 12, names=(EVIL, "light"))
    run = train(ClassifyConfig(data=str(data), **SMALL), tmp_path / "run")
    page, found = read(run)
    check_self_contained(page, found)
    assert EVIL not in page and "<img src=x" not in page
    assert found.text.count(EVIL) >= 1  # told, but as text
    assert "accuracy" in found.text and "order of the probability of the true class" in found.text


def test_names_of_files_are_text(tmp_path):
    data = pairs(tmp_path / "data")
    for folder in ("images", "masks"):
        for file in (data / folder).iterdir():
            file.rename(file.with_name(EVIL + file.name))
    page, found = read(train(SegmentConfig(data=str(data), **SMALL), tmp_path / "run"))
    check_self_contained(page, found)
    assert EVIL in found.text and EVIL not in page


@pytest.mark.parametrize("kind", ["dicom", "nifti", "folders"])
def test_no_name_of_a_patient_reaches_a_file_of_the_run(tmp_path, kind):
    root = tmp_path / f"data of {NAME}"
    for patient in range(5):
        name, mask = f"{NAME}{patient}", blob(16, patient - 2)
        picture = noisy(mask, patient)
        if kind == "dicom":
            write_dicom(root / "images" / f"{name}.dcm", picture.astype(np.int16), PatientID=name)
            write_png(root / "masks" / f"{name}.png", mask)
        elif kind == "folders":
            write_png(root / name / "images" / "a.png", picture)
            write_png(root / name / "masks" / "a.png", mask)
        else:
            write_nifti(root / "images" / f"{name}.nii", picture[..., None].astype(np.int16))
            write_nifti(root / "masks" / f"{name}.nii", mask[..., None])
    run = train(SegmentConfig(data=str(root), **SMALL), tmp_path / "run")
    page, found = read(run)
    assert re.search(r"patient \d, image 1: Dice", found.text)
    assert NAME not in found.text and "Doe" not in page
    assert "Doe" not in (run / "metrics.jsonl").read_text()
    assert not [file for file in run.rglob("*") if "Doe" in file.name]


def test_a_run_that_has_not_ended_has_a_report_and_one_of_text_none(tmp_path):
    record = {"kind": "segment", "status": "running", "config": {}, "plan": {}, "data": {}}
    folder = RunFolder.create(tmp_path / "run", record, fill=lambda path: None)
    assert "Nothing is recorded yet" in write_report(folder.path).read_text()
    folder.update(kind="pretrain")
    with pytest.raises(ValueError, match="segment or classify, got one of pretrain"):
        write_report(folder.path)
    folder.close()


@pytest.mark.parametrize(
    "result",
    [{"scores": {}}, {"scores": 3}, {"scores": {"dice": [0.5]}}, {"scores": [], "loss": 1}],
)
def test_a_damaged_result_is_refused(tmp_path, result):
    record = {"kind": "segment", "status": "finished", "result": result}
    folder = RunFolder.create(tmp_path / "run", record, fill=lambda path: None)
    folder.close()
    with pytest.raises(ValueError, match="as the run wrote it") as error:
        write_report(folder.path)
    assert "\n" not in str(error.value)


def test_a_picture_shows_image_truth_and_prediction():
    image = np.full((16, 16, 3), 100, np.uint8)
    truth, found = np.zeros((2, 16, 16), np.uint8)
    truth[4:8, 4:8], found[4:8, 4:12] = 1, 1
    drawn = overlays.triptych(image, truth, found)
    times = overlays.SIDE // 16
    width = 16 * times
    assert drawn.shape == (width, 3 * width + 2 * overlays.GAP, 3)
    left, middle, right = (
        drawn[:, start : start + width] for start in (k * (width + overlays.GAP) for k in range(3))
    )
    assert (left == 100).all()
    inside = 6 * times, 6 * times
    assert tuple(middle[inside]) == tuple(right[inside]) != (100, 100, 100)
    assert (middle[6 * times, 10 * times] == 100).all()  # found, not true
    assert (right[6 * times, 10 * times] != 100).any()
    assert (right[4 * times, 6 * times] == 255).all()  # the outline of the truth
    assert (right[0, 0] == 100).all()


def test_worst_come_first():
    assert overlays.worst_first([7, 3, 5], np.array([0.5, 0.1, 0.9])) == [(3, 0.1), (7, 0.5), (5, 0.9)]  # fmt: skip


def test_a_case_is_a_png_of_what_the_network_saw(tmp_path):
    data = pairs(tmp_path / "data")
    run = train(SegmentConfig(data=str(data), **SMALL), tmp_path / "run")
    [file] = sorted((run / "cases").iterdir())
    with Image.open(file) as picture:
        assert picture.format == "PNG" and picture.height == 256


def test_figures_of_many_classes_and_one_epoch_can_be_drawn():
    counts = np.eye(50) * 3 + 1
    figures.confusion(counts, [f"class number {n} $x_1$" for n in range(50)]).canvas.draw()
    drawn = figures.scores([1], {"Dice": [0.5]}, ([0.4], [0.6]), None)
    drawn.canvas.draw()
    figures.distribution([], "Dice").canvas.draw()
