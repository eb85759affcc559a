"""`lowrank-geo pretrain --optimizer NAME` for every name: it trains, is validated, saved and read back."""

import json
import math

import pytest

from lowrank_geo.models.decoder import DecoderConfig
from lowrank_geo.models.presets import DECODERS
from lowrank_geo.optim import OPTIMIZERS
from lowrank_geo.train.config import TrainConfig
from lowrank_geo.train.parts import load_model
from lowrank_geo.train.run import pretrain

TIED = ("adam", "adam-core", "adam-scalar")  # what knows the noise of the gradients
TINY = DecoderConfig(vocab_size=257, width=16, layers=1, heads=2, hidden=24, context=16)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_steps_of_every_optimizer(name, tmp_path, monkeypatch):
    monkeypatch.setitem(DECODERS, "tiny", TINY)
    monkeypatch.setattr("lowrank_geo.train.recorder.write_report", lambda run: run / "report.html")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} is {n * n % 97}\n" for n in range(400)))
    config = TrainConfig(
        data=str(text), model="tiny", optimizer=name, steps=2, batch=2, eval_every=1, ratio=0.25,
        warmup=0, device="cpu",
    )  # fmt: skip
    run = pretrain(config, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    held_out = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in trained] == [1, 2] and all(line["lr"] > 0 for line in trained)
    ratios = [line.get("signal_to_noise") for line in lines if line["kind"] == "diagnostics"]
    assert ((ratios[-1] or 0) > 0) == (name in TIED)
    assert all(map(math.isfinite, held_out)) and len(set(held_out)) == len(held_out) >= 2
    model, _ = load_model(run)
    assert all(p.isfinite().all() for p in model.parameters())
