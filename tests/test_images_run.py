"""Runs on images from a config to a finished folder: learning, resuming, stopping, refusing, in this process."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from image_files import noisy, write_png
from image_runs import SMALL, by_class, last_bits, measured, pairs
from torch import nn

from lowrank_geo.images import run as module
from lowrank_geo.images.config import ClassifyConfig, SegmentConfig, filled
from lowrank_geo.images.epochs import Epochs, in_order
from lowrank_geo.images.judging import judge, settle
from lowrank_geo.images.losses import segmentation_loss
from lowrank_geo.images.run import load_model, new_trainer, resume, train
from lowrank_geo.images.scores import image_scores
from lowrank_geo.images.tasks import SEGMENT, read_segmentation
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.optim.named import OPTIMIZERS
from lowrank_geo.train.distributed import Workers
from lowrank_geo.train.run_folder import RunFolder, read_record
from lowrank_geo.train.stopped import Stopped

KINDS = ("adam", "dlrt-adam", "fsgdm", "schedule-free-polyak")  # the others are slow together


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes a second a run and is tested with the report."""
    monkeypatch.setattr("lowrank_geo.images.finish.write_report", lambda run: run / "report.html")


@pytest.fixture
def config(tmp_path):
    return SegmentConfig(data=str(pairs(tmp_path / "data")), **SMALL)


def trainer_of(config):
    config = filled(config)
    return new_trainer(config, read_segmentation(config), Workers(torch.device("cpu")))


def test_a_network_learns_discs_and_the_folder_holds_it(config, tmp_path):
    config = dataclasses.replace(config, epochs=12, augment=False)
    run = train(config, tmp_path / "run")
    record = read_record(run)
    assert record["status"] == "finished" and record["kind"] == "segment"
    result = record["result"]
    assert result["scores"]["dice"][0] > 0.9
    losses = [line["loss"] for line in measured(run) if line["kind"] == "eval"]
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    trained = load_model(run)
    images = read_segmentation(filled(config))
    again = judge(
        trained.model,
        in_order(images, images.split.test, 4),
        segmentation_loss,
        device=torch.device("cpu"),
    )
    assert image_scores(again.counts).dice.mean() == pytest.approx(result["scores"]["dice"][0])
    assert again.counts.sum(0).tolist() == result["confusion"]
    assert trained.classes == ["background", "foreground"] and not trained.model.training


def test_classes_are_learned(tmp_path):
    config = ClassifyConfig(data=str(by_class(tmp_path / "data", 12)), **SMALL | {"epochs": 8})
    result = read_record(train(config, tmp_path / "run"))["result"]
    assert result["scores"]["accuracy"][0] == 1.0
    assert np.trace(result["confusion"]) == result["images"] == 2
    assert {case["truth"] for case in result["cases"]} == {"dark", "light"}


def test_the_best_epoch_is_kept_not_the_last(config, tmp_path, monkeypatch):
    trainer = trainer_of(config)
    scores, states = iter([0.3, 0.9, 0.5]), []
    means = {"dice": 0.0}
    monkeypatch.setattr(
        trainer, "task", SEGMENT._replace(means=lambda counts: means | {"dice": next(scores)})
    )
    for _ in range(3):
        for _ in range(trainer.epochs.steps):
            trainer.advance()
        states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        trainer.validate()
    assert (trainer.best.epoch, trainer.best.score) == (2, 0.9)
    assert all(torch.equal(trainer.best.model[k], v) for k, v in states[1].items())
    assert not all(torch.equal(trainer.best.model[k], v) for k, v in states[2].items())


def test_a_plateau_lowers_the_rate_and_no_better_score_ends_the_run(config, tmp_path):
    """Rate 0 learns nothing: the loss stays, and the first epoch stays the best."""
    config = dataclasses.replace(config, epochs=30, patience=1, stop_after=4, lr=1e-30)
    run = train(config, tmp_path / "run")
    evaluations = [line for line in measured(run) if line["kind"] == "eval"]
    best = evaluations[-1]["best"]
    assert evaluations[-1]["epoch"] == best + 4 < 30
    ranked = [(line["dice"], -line["loss"]) for line in evaluations]
    assert ranked.index(max(ranked)) == best - 1
    trainer = trainer_of(dataclasses.replace(config, lr=1.0))
    for loss in (2.0, 1.0, 1.0, 1.0):
        trainer.plateau.step(loss)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


class Cut(BaseException):
    """A power cut."""


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.thorough), 4, 7])
@pytest.mark.parametrize(
    "changes",
    [{}, {"budget": 0.5, "optimizer": "muon"}, {"optimizer": "schedule-free-adam"}],
    ids=["adamw", "muon", "schedule-free"],
)
def test_a_run_cut_off_ends_with_the_same_bits(config, tmp_path, at, changes):
    config = dataclasses.replace(config, **changes)
    whole = train(config, tmp_path / "whole")
    cut = tmp_path / "cut"

    def power(line):
        if line["kind"] == "train" and line["step"] == at:
            raise Cut

    with pytest.raises(Cut):
        train(config, cut, listeners=[power])
    resume(cut)
    assert last_bits(cut) == last_bits(whole) and measured(cut) == measured(whole)
    assert read_record(cut)["status"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_in_the_middle_of_an_epoch(config, tmp_path, number):
    config = dataclasses.replace(config, mode="reversible")
    whole, run = train(config, tmp_path / "whole"), tmp_path / "run"

    def stop(line):
        if line["kind"] == "train" and line["step"] == 5:
            signal.raise_signal(number)

    with pytest.raises(Stopped, match="at step 5, which is saved") as stopped:
        train(config, run, listeners=[stop])
    assert stopped.value.code == 128 + number and read_record(run)["status"] == "interrupted"
    resume(run)
    assert last_bits(run) == last_bits(whole) and measured(run) == measured(whole)


def test_a_finished_run_stays_as_it_is(config, tmp_path):
    run = train(config, tmp_path / "run")
    before = last_bits(run), read_record(run)["result"]["confusion"]
    resume(run)
    assert (last_bits(run), read_record(run)["result"]["confusion"]) == before


def test_both_modes_and_the_plain_network_train(config, tmp_path):
    for gamma, mode in ((0.0, "backprop"), (0.5, "reversible")):
        run = train(dataclasses.replace(config, gamma=gamma, mode=mode), tmp_path / mode)
        assert read_record(run)["status"] == "finished"


def test_a_budget_makes_convolutions_low_rank_and_is_kept(config, tmp_path):
    config = dataclasses.replace(config, budget=0.5, width=8)
    run = train(config, tmp_path / "run")
    counts = read_record(run)["parameters"]
    assert counts["low_rank"] <= 0.5 * counts["dense"]
    layers = [layer for _, layer in lowrank_layers(load_model(run).model)]
    assert len(layers) > 5


@pytest.mark.parametrize("optimizer", [None, "muon"])
def test_weights_stay_on_the_manifold(config, tmp_path, optimizer):
    config = dataclasses.replace(config, budget=0.5, width=8, optimizer=optimizer, lr=None)
    for _, layer in lowrank_layers(load_model(train(config, tmp_path / "run")).model):
        assert (layer.U.mT @ layer.U - torch.eye(layer.rank)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "optimizer",
    [
        name if name in KINDS else pytest.param(name, marks=pytest.mark.thorough)
        for name in OPTIMIZERS
    ],
)
def test_every_optimizer_lowers_the_loss(config, optimizer):
    """Also those that average, adapt ranks or follow the length of the run."""
    config = dataclasses.replace(
        config, budget=0.5, width=8, optimizer=optimizer, lr=None, epochs=6, augment=False
    )
    trainer = trainer_of(config)
    losses = [trainer.advance()["loss"] for _ in range(18)]
    assert sum(losses[-3:]) < sum(losses[:3])
    trainer.validate()
    trainer.checkpoint()


def test_batches_are_even_and_a_function_of_the_step(config):
    images = read_segmentation(filled(config))
    epochs = Epochs(images, 4, 0, augmented=True)
    sizes = [len(epochs.at(step).images) for step in range(epochs.steps)]
    assert sizes == [4, 3, 3] and len(images.split.train) == 10
    first = epochs.at(7).images
    epochs.at(2)
    assert torch.equal(epochs.at(7).images, first)
    plain = Epochs(images, 10, 0, augmented=False)
    for step in (0, 1):  # every image once an epoch
        seen = sorted(x.sum().item() for x in plain.at(step).images)
        wanted = sorted(images.samples[i].image.float().div(255).sum().item() for i in images.split.train)  # fmt: skip
        assert seen == pytest.approx(wanted)
    assert not torch.equal(plain.at(0).images, plain.at(1).images)


def test_averaged_weights_get_statistics_of_their_own():
    norm = nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) * 3 + 2
    settle(norm, [x[:2], x[2:]])
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), atol=1e-6)
    assert norm.momentum == 0.1 and norm.training


def test_judging_changes_nothing(config):
    trainer = trainer_of(config)
    trainer.advance()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.judge(trainer.images.split.val)
    assert trainer.model.training
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stopped, match="finite loss and gradient, got loss .*lower --lr") as stopped:
        train(dataclasses.replace(config, lr=1e30, epochs=20), run)
    assert stopped.value.code == 2 and read_record(run)["status"] == "failed"


def test_resuming_refuses_other_data_options_and_commands(config, tmp_path):
    run = train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="--resume needs the options of the run, got --gamma 0.5"):
        resume(run, changes={"gamma": 0.5})
    with pytest.raises(ValueError, match="classify needs a run that it made, .* which segment"):
        resume(run, command="classify")
    picture = noisy(np.zeros((16, 16), np.uint8), 5)
    write_png(tmp_path / "data" / "images" / "case03.png", picture)
    with pytest.raises(ValueError, match="needs the data that the run began with"):
        resume(run)


def test_a_run_of_text_or_a_held_one_is_refused(config, tmp_path):
    run = train(config, tmp_path / "run")
    folder = RunFolder.open(run)
    with pytest.raises(BlockingIOError, match="another one holds"):
        resume(run)
    folder.close()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"kind": "pretrain"}))
    for use in (resume, load_model):
        with pytest.raises(ValueError, match="which pretrain made; use lowrank-geo pretrain"):
            use(run)


def test_damaged_runs_are_refused_in_one_sentence(config, tmp_path):
    run = train(config, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    for changes, said in (
        ({"config": record["config"] | {"width": 5}}, "of shape"),
        ({"config": record["config"] | {"gamma": 2.0}}, "below 1, got 2.0"),
        ({"config": {}}, "exactly the options"),
        ({"data": record["data"] | {"classes": 3}}, "the classes and channels"),
    ):
        (run / "run.json").write_text(json.dumps(record | changes))
        with pytest.raises(ValueError, match=said) as error:
            load_model(run)
        assert "\n" not in str(error.value)
    (run / "run.json").write_text(json.dumps(record))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="needs a checkpoint to be used"):
        load_model(run)


def test_nothing_is_left_of_a_run_that_cannot_begin(config, tmp_path):
    (tmp_path / "data" / "masks" / "case03.png").write_bytes(b"no mask")
    with pytest.raises(ValueError, match=r"case03.png .*--skip-bad"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = train(dataclasses.replace(config, skip_bad=True), tmp_path / "run")
    told = (run / "run.json").read_text()
    assert "1 bad files skipped" in told and "case03" not in told


def test_several_processes_are_refused():
    with pytest.raises(ValueError, match="one process, got 2; start it without torchrun"):
        module.check_alone(Workers(torch.device("cpu"), 0, 2))
