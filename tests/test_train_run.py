"""Runs from a config to a finished folder: resuming, stopping and refusing, in this process."""

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch

from lowrank_geo.models.decoder import DecoderConfig
from lowrank_geo.models.presets import DECODERS
from lowrank_geo.train import checkpoint
from lowrank_geo.train.config import TrainConfig
from lowrank_geo.train.parts import load_model, vocabulary
from lowrank_geo.train.run import pretrain, resume
from lowrank_geo.train.run_folder import RunFolder, read_record
from lowrank_geo.train.stopped import Stopped
from lowrank_geo.train.trainer import Trainer

TINY = DecoderConfig(vocab_size=257, width=16, layers=1, heads=2, hidden=24, context=16)
EVERY_BIT = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setitem(DECODERS, "tiny", TINY)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} is {n * n % 97}\n" for n in range(400)))
    return TrainConfig(
        data=str(text), model="tiny", steps=8, batch=4, eval_every=4, checkpoint_every=3,
        diagnose_every=4, ratio=0.25, device="cpu",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes two seconds a run and is tested with the report."""

    def write_report(run: Path) -> Path:
        (run / "report.html").touch()
        return run / "report.html"

    monkeypatch.setattr("lowrank_geo.train.recorder.write_report", write_report)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run):
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines(run)]


def last_bits(run):
    path = checkpoint.steps(run / "checkpoints")[0]
    return path.name, [(path / name).read_bytes() for name in EVERY_BIT]


def stop_at(step, number=signal.SIGINT):
    """A listener that sends this process a signal after a step."""

    def listen(line):
        if line["kind"] == "train" and line["step"] == step:
            signal.raise_signal(number)

    return listen


def test_a_finished_run_holds_what_was_promised(config, tmp_path):
    heard = []
    run = pretrain(config, tmp_path / "deep" / "run", listeners=[heard.append])
    record = read_record(run)
    assert record["status"] == "finished" and record["config"] == config.to_json()
    assert record["samples"][0]["text"].startswith(config.prompt)
    assert 0 < record["parameters"]["low_rank"] < record["parameters"]["dense"]
    kinds = [(line["kind"], line["step"]) for line in lines(run)]
    assert kinds == [
        ("diagnostics", 0), ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("eval", 4),
        ("diagnostics", 4), ("train", 5), ("train", 6), ("train", 7), ("train", 8), ("eval", 8),
        ("diagnostics", 8),
    ]  # fmt: skip
    assert [line["kind"] for line in heard] == ["start", *(k for k, _ in kinds), "end"]
    assert [p.name for p in checkpoint.steps(run / "checkpoints")] == [
        "step-00000008", "step-00000006",
    ]  # fmt: skip


def test_it_learns(config, tmp_path):
    run = pretrain(dataclasses.replace(config, steps=60), tmp_path / "run")
    losses = [line["loss"] for line in lines(run) if line["kind"] == "eval"]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("optimizer", ["muon", "adam", "adamw", "schedule-free-polyak"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed_ends_with_the_same_bits(config, tmp_path, optimizer, number, code):
    config = dataclasses.replace(config, optimizer=optimizer)
    whole = pretrain(config, tmp_path / "whole")
    with pytest.raises(Stopped, match="at step 5, which is saved") as stopped:
        pretrain(config, tmp_path / "cut", listeners=[stop_at(5, number)])
    assert stopped.value.code == code
    assert read_record(tmp_path / "cut")["status"] == "interrupted"
    cut = resume(tmp_path / "cut")
    assert read_record(cut)["status"] == "finished"
    assert last_bits(cut) == last_bits(whole)
    assert without_times(cut) == without_times(whole)


def test_a_signal_before_the_first_step_is_saved_too(config, tmp_path):
    whole = pretrain(config, tmp_path / "whole")

    def stop(line):
        if line["kind"] == "diagnostics" and line["step"] == 0:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped, match="at step 0"):
        pretrain(config, tmp_path / "cut", listeners=[stop])
    assert without_times(resume(tmp_path / "cut")) == without_times(whole)
    assert last_bits(tmp_path / "cut") == last_bits(whole)


def test_signals_have_their_usual_effect_afterwards(config, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    pretrain(config, tmp_path / "run")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert not torch.are_deterministic_algorithms_enabled()


class Crash(Exception):
    """Something that is nobody's plan."""


def crash_at(step):
    def listen(line):
        if line["kind"] == "train" and line["step"] == step:
            raise Crash

    return listen


@pytest.mark.parametrize("step", [1, 5])
def test_a_crash_is_resumed_from_the_checkpoint_and_metrics_after_it_are_cut(
    config, tmp_path, step
):
    whole = pretrain(config, tmp_path / "whole")
    with pytest.raises(Crash):
        pretrain(config, tmp_path / "cut", listeners=[crash_at(step)])
    assert read_record(tmp_path / "cut")["status"] == "failed"
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    cut = resume(tmp_path / "cut")
    assert without_times(cut) == without_times(whole)
    assert last_bits(cut) == last_bits(whole)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(config, tmp_path):
    whole = pretrain(config, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "checkpoints" / "step-00000008" / "model.safetensors").write_bytes(b"")
    heard = []
    resume(cut, listeners=[heard.append])
    assert heard[0]["step"] == 6 and "needs" in heard[0]["notes"][0]
    assert last_bits(cut) == last_bits(whole)
    assert without_times(cut) == without_times(whole)


def test_micro_batches_change_the_losses_by_rounding_only(config, tmp_path):
    one = pretrain(config, tmp_path / "one")
    four = pretrain(dataclasses.replace(config, accumulate=4), tmp_path / "four")
    for a, b in zip(lines(one), lines(four), strict=True):
        assert "loss" not in a or math.isclose(a["loss"], b["loss"], rel_tol=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_step(config, tmp_path, monkeypatch):
    whole = pretrain(dataclasses.replace(config, steps=4, warmup=0, schedule="constant"),
                     tmp_path / "whole")  # fmt: skip
    stopping = dataclasses.replace(config, warmup=0, schedule="constant", accumulate=2)
    advance = Trainer.advance

    def spoil_the_fifth_step(trainer):
        if trainer.step == 4:
            seen = iter(range(2))
            trainer.model.register_forward_hook(
                lambda module, inputs, logits: logits * (torch.nan if next(seen) else 1)
            )
        return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", spoil_the_fifth_step)
    with pytest.raises(Stopped, match="step 5 needs a finite loss .* got loss nan") as stopped:
        pretrain(stopping, tmp_path / "run")
    assert stopped.value.code == 2 and "--lr" in str(stopped.value)
    run = tmp_path / "run"
    assert read_record(run)["status"] == "failed"
    assert checkpoint.newest(run / "checkpoints").path.name == "step-00000003"
    assert [x["step"] for x in lines(run) if x["kind"] == "train"] == [1, 2, 3, 4]
    assert whole.exists()


def test_parameters_that_are_not_finite_do_not_become_a_checkpoint(config, tmp_path, monkeypatch):
    advance = Trainer.advance

    def overflow(trainer):
        line = advance(trainer)
        if trainer.step == 6:
            trainer.model.norm.weight.data[0] = torch.inf
        return line

    monkeypatch.setattr(Trainer, "advance", overflow)
    with pytest.raises(Stopped, match="step 6 needs finite parameters, got others in norm.weight"):
        pretrain(config, tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").path.name == "step-00000003"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ratio": None, "budget": 1.5}, "budget"),
        ({"ratio": None, "budget": 1e-6}, "budget"),
        ({"ratio": None, "rank": 0}, "rank"),
        ({"ratio": None, "rank": 17}, "rank"),
        ({"optimizer": "adan"}, "got adan"),
        ({"model": "3t"}, "'3t'"),
        ({"data": "/does/not/exist"}, "/does/not/exist"),
        ({"context": 9999}, "9999"),
    ],
)
def test_bad_input_leaves_nothing_behind(config, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as refused:
        pretrain(dataclasses.replace(config, **changes), tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_refused_and_overwritten_on_demand(config, tmp_path):
    run = pretrain(config, tmp_path / "run")
    before = without_times(run)
    with pytest.raises(FileExistsError, match="--resume .*run.* --overwrite"):
        pretrain(config, run)
    assert without_times(run) == before
    pretrain(dataclasses.replace(config, seed=1), run, overwrite=True)
    assert without_times(run) != before


def test_a_run_in_use_is_not_resumed(config, tmp_path):
    folder = RunFolder.open(pretrain(config, tmp_path / "run"))
    with pytest.raises(BlockingIOError, match="used by one process"):
        resume(tmp_path / "run")
    folder.close()


def test_resuming_keeps_the_options(config, tmp_path):
    run = pretrain(config, tmp_path / "run")
    with pytest.raises(ValueError, match="got --batch 8 where it has 4"):
        resume(run, changes={"batch": 8})
    resume(run, changes={"batch": 4, "device": "cpu"})


def test_resuming_with_another_text_is_refused(config, tmp_path):
    run = pretrain(config, tmp_path / "run")
    with Path(config.data).open("a") as text:
        text.write("one more\n")
    with pytest.raises(ValueError, match="the data that the run began with"):
        resume(run)


def edited(run, part, **values):
    record = json.loads((run / "run.json").read_text())
    record[part] |= values
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "values, said",
    [
        ({"width": 32}, "."),
        ({"vocab_size": 10**9}, "embed.weight"),
        ({"layers": 10**9}, "needs tensors for 1000000000 layers"),
        ({"layers": "many"}, "layers"),
        ({"depth": 3}, "damaged"),
    ],
)
def test_a_model_that_does_not_fit_its_checkpoint_is_refused(config, tmp_path, values, said):
    run = pretrain(config, tmp_path / "run")
    edited(run, "model", **values)
    for use in (resume, load_model):
        with pytest.raises(ValueError, match=said) as refused:
            use(run)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_config_that_asks_for_another_model_is_refused_before_it_is_made(
    config, tmp_path, monkeypatch, checkpoints
):
    run = pretrain(config, tmp_path / "run")
    if not checkpoints:
        shutil.rmtree(run / "checkpoints")
    edited(run, "config", model="1b")
    monkeypatch.setattr("lowrank_geo.train.run.new_model", None)
    with pytest.raises(ValueError, match="whose config asks for its model, got --model 1b"):
        resume(run)


def test_the_model_of_a_run_is_that_of_its_last_checkpoint(config, tmp_path):
    run = pretrain(config, tmp_path / "run")
    model, tokenizer = load_model(run)
    assert tokenizer.vocab_size == 257
    record = read_record(run)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]["low_rank"]
    with pytest.raises(FileNotFoundError, match="a folder with a run.json"):
        load_model(tmp_path)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="a checkpoint to be used, got none"):
        load_model(run)


def test_a_trained_bpe_tokenizer_goes_with_the_run(config, tmp_path):
    config = dataclasses.replace(config, tokenizer="bpe", vocab_size=270)
    assert vocabulary(config) == 270
    run = pretrain(config, tmp_path / "run")
    model, tokenizer = load_model(run)
    assert tokenizer.decode(tokenizer.encode("line 7")) == "line 7"
    assert model.config.vocab_size == tokenizer.vocab_size == read_record(run)["data"]["vocab_size"]


def test_tensorboard_gets_the_losses(config, tmp_path):
    run = pretrain(dataclasses.replace(config, tensorboard=True), tmp_path / "run")
    [events] = (run / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"eval/loss" in events.read_bytes()


def test_bfloat16_keeps_parameters_in_float32(config, tmp_path):
    run = pretrain(dataclasses.replace(config, dtype="bfloat16"), tmp_path / "run")
    exact = pretrain(config, tmp_path / "exact")
    model, _ = load_model(run)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    losses = [[x["loss"] for x in lines(r) if x["kind"] == "train"] for r in (run, exact)]
    assert losses[0] != losses[1] and math.isclose(losses[0][0], losses[1][0], rel_tol=0.01)
