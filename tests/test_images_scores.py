"""scores, intervals, losses: the formulas pixel by pixel, the conventions for nothing, coverage of the intervals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from lowrank_geo.images.intervals import interval, mean_interval
from lowrank_geo.images.losses import dice_loss, segmentation_loss
from lowrank_geo.images.scores import class_scores, confusion, image_scores

HALF = torch.tensor([[[0, 0], [1, 1]]])
NONE, ALL = torch.zeros(1, 2, 2).long(), torch.ones(1, 2, 2).long()


def scores(predicted, truth, classes=2):
    return image_scores(confusion(predicted, truth, classes).numpy())


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_are_those_of_scikit_learn(classes):
    predicted, truth = torch.randint(0, classes, (2, 6, 9, 7))
    found = scores(predicted, truth, classes)
    labels = list(range(1, classes))
    for i in range(6):
        p, t = predicted[i].flatten().numpy(), truth[i].flatten().numpy()
        settings = {"labels": labels, "average": "macro"}
        assert abs(found.dice[i] - f1_score(t, p, **settings)) < 1e-12
        assert abs(found.iou[i] - jaccard_score(t, p, **settings)) < 1e-12
        assert abs(found.recall[i] - recall_score(t, p, **settings)) < 1e-12
        assert abs(found.precision[i] - precision_score(t, p, **settings)) < 1e-12


def test_class_scores_are_those_of_scikit_learn():
    p, t = torch.randint(0, 5, (2, 200))
    found = class_scores(confusion(p[None], t[None], 5)[0].numpy())
    assert abs(found.accuracy - (p == t).float().mean()) < 1e-6
    assert abs(found.f1 - f1_score(t, p, average="macro")) < 1e-12
    assert abs(found.recall - recall_score(t, p, average="macro")) < 1e-12
    assert abs(found.precision - precision_score(t, p, average="macro")) < 1e-12


@pytest.mark.parametrize(
    "predicted, truth, wanted",
    [
        (NONE, NONE, (1, 1, 1, 1)),
        (HALF, HALF, (1, 1, 1, 1)),
        (NONE, HALF, (0, 0, 0, 1)),
        (HALF, NONE, (0, 0, 1, 0)),
        (ALL, HALF, (2 / 3, 1 / 2, 1, 1 / 2)),
    ],
)
def test_the_conventions_for_nothing(predicted, truth, wanted):
    assert [x[0] for x in scores(predicted, truth)] == pytest.approx(wanted)


def test_a_class_in_neither_does_not_count():
    predicted, truth = torch.tensor([[[1, 1, 0]]]), torch.tensor([[[1, 1, 0]]])
    assert scores(predicted, truth, 3).dice[0] == 1


def test_bce_and_dice_are_the_published_formulas():
    """Pixel by pixel, from one sigmoid output as in the published code, in float64."""
    logits, mask = torch.randn(3, 2, 5, 4), torch.randint(0, 2, (3, 5, 4))
    z, t = (logits[:, 1] - logits[:, 0]).double(), mask.double()
    p = torch.sigmoid(z)
    bce = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    assert abs(segmentation_loss(logits, mask) - (bce + dice)) < 1e-6


def test_the_loss_of_three_classes_is_the_mean_over_two():
    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    p, terms = logits.softmax(1), []
    for c in (1, 2):
        t = (mask == c).float()
        terms.append(1 - (2 * (p[:, c] * t).sum() + 1) / (p[:, c].sum() + t.sum() + 1))
    assert abs(dice_loss(logits, mask) - sum(terms) / 2) < 1e-6
    perfect = 40 * F.one_hot(mask, 3).permute(0, 3, 1, 2).float()
    assert segmentation_loss(perfect, mask) < 1e-6


def test_intervals_cover_the_mean_about_95_times_in_100():
    """Means of 40 draws, 200 times: between 88 and 99 % of the intervals hold the true mean."""
    draw = np.random.default_rng(1)
    groups = [str(i) for i in range(40)]
    hits = 0
    for _ in range(200):
        found = mean_interval(draw.normal(0.7, 0.1, 40), groups)
        hits += found.low <= 0.7 <= found.high
    assert 0.88 < hits / 200 < 0.99


def test_images_of_one_patient_are_not_counted_as_many():
    draw = np.random.default_rng(0)
    values = np.repeat(draw.normal(0.7, 0.1, 10), 20)
    by_image = mean_interval(values, [str(i) for i in range(200)])
    by_patient = mean_interval(values, [str(i // 20) for i in range(200)])
    assert by_patient.mean == pytest.approx(by_image.mean) == pytest.approx(values.mean())
    assert (by_patient.high - by_patient.low) > 3 * (by_image.high - by_image.low)


def test_an_interval_of_any_statistic_and_of_one_group():
    tables = np.stack([np.eye(2), np.eye(2), np.ones((2, 2))])
    found = interval(tables, ["a", "b", "c"], lambda total: class_scores(total).accuracy)
    assert found.low < found.mean == 0.75 < found.high
    assert mean_interval(np.array([0.2, 0.4]), ["a", "a"]) == pytest.approx((0.3, 0.3, 0.3))
