"""benchmarks/gpu.py: its refusal without a GPU, and its logic at sizes that an interpreter can run."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE

from lowrank_geo.dispatch import use_backend
from lowrank_geo.models.decoder import DecoderConfig
from lowrank_geo.models.presets import DECODERS

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    return gpu


@pytest.fixture
def small(gpu, monkeypatch):
    config = DecoderConfig(vocab_size=256, width=12, layers=1, heads=2, hidden=20, context=8)
    monkeypatch.setitem(DECODERS, "tiny", config)
    return gpu.Sizes(
        matrices=2, rows=40, ranks=(4, 8), checked=(), tokens=16, context=8, layers=((20, 16, 4),), step_model="tiny",
        train_model="tiny", budget=0.9, depths=(1, 2), repeats=1,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence():
    result = subprocess.run([sys.executable, FOLDER / "gpu.py"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr
        == "gpu.py needs a CUDA device, got none; run it where torch.cuda.is_available()\n"
    )


def test_exponents_are_fitted(gpu):
    sizes = [16, 96, 256]
    assert math.isclose(gpu.exponent(sizes, [3 * s**1.5 for s in sizes]), 1.5)


def test_correct_kernels_pass_and_wrong_ones_stop_the_run(gpu, small, monkeypatch):
    layers = {"layer, float32", "layer, bfloat16"}
    assert set(gpu.check(small, DEVICE)) == set(gpu.stacks(1, 4, 2, DEVICE)) | layers
    from lowrank_geo import operators

    right = operators.transport
    monkeypatch.setattr(
        operators, "transport", lambda *given: tuple(1.001 * x for x in right(*given))
    )
    with pytest.raises(
        SystemExit, match="needs correct kernels before it times them, got errors {'transport'"
    ):
        gpu.check(small, DEVICE)
    monkeypatch.setattr(operators, "transport", right)
    linear = operators.lowrank_linear
    monkeypatch.setattr(
        operators, "lowrank_linear", lambda *given: tuple(1.1 * x for x in linear(*given))
    )
    with pytest.raises(SystemExit, match="errors {'layer, float32'.*'layer, bfloat16'"):
        gpu.check(small, DEVICE)


def test_every_pass_and_operation_has_a_row(gpu, small):
    rows = gpu.kernel_rows(small, DEVICE)
    assert len(rows) == 2 * len(gpu.passes(gpu.stacks(1, 8, 2, DEVICE)))
    assert all(row["of_copy"] > 0 for row in rows)
    rows = gpu.operation_rows(small, DEVICE, compiled=False)
    assert {row["operation"] for row in rows} == {
        "tangent",
        "transport",
        "retract",
        "polar",
        "spectral",
    }


def test_layers_are_compared_with_the_dense_one(gpu, small):
    (row,) = gpu.layer_rows(small, DEVICE, compiled=False)
    assert row["speedup"]["dense"] == 1 and set(row["speedup"]) == {
        "triton",
        "torch",
        "two factors",
        "dense",
    }
    assert math.isclose(row["limit"], 20 * 16 / (4 * 36))


@pytest.mark.slow
def test_whole_training_steps_are_compared(gpu, small, monkeypatch):
    monkeypatch.delitem(gpu.OPTIMIZERS, "RiemannianMuon")
    small = small._replace(tokens=8)
    rows = gpu.step_rows(small, DEVICE, compiled=False)
    assert [set(row["share"]) for row in rows] == 2 * [{"triton", "torch"}]
    rows = gpu.train_rows(small, DEVICE, compiled=False)
    assert [row["model"] for row in rows] == ["dense", "triton", "torch", "two factors"]
    assert rows[1]["parameters"] <= 0.9 * rows[0]["parameters"] and rows[0]["over_dense"] == 1


@pytest.mark.slow
def test_launches_and_growth_are_counted_over_depth(gpu, small, monkeypatch):
    monkeypatch.delitem(gpu.OPTIMIZERS, "RiemannianMuon")
    monkeypatch.delitem(gpu.OPTIMIZERS, "RiemannianAdam")
    with use_backend("triton"):
        counts = gpu.launches(small, DEVICE)
    assert all(len(set(found)) == 1 and found[0] > 0 for found in counts.values())
    assert {row["cost"] for row in gpu.growth(small, DEVICE)} == {
        "layer over rank", "layer over tokens", "step over depth"
    }  # fmt: skip


def test_parts_that_come_too_late_are_left_out(gpu, capsys):
    found = gpu.measure({"first": lambda: [{"a": 1.0}], "second": lambda: {"b": 2}}, 1.0)
    assert found == {"first": [{"a": 1.0}], "second": {"b": 2}}
    assert gpu.measure({"first": lambda: {"b": 2}}, -1.0) == {"first": None}
    assert "left out: out of time" in capsys.readouterr().out


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(gpu, tmp_path):
    def fail():
        raise RuntimeError("out of memory\nat length")

    store = gpu.Lines(tmp_path / "gpu.jsonl")
    todo = {"slow": lambda: time.sleep(60), "bad": fail, "good": lambda: {"b": 2}}
    found = gpu.measure({k: todo[k] for k in ("bad", "good")}, 1.0, "H", store)
    assert found == {"bad": {"failed": "RuntimeError: out of memory"}, "good": {"b": 2}}
    assert gpu.measure({"slow": todo["slow"]}, 0.01, "H", store) == {"slow": None}
    lines = gpu.Lines(store.path).records
    assert [(line["part"], line["device"], line["result"]) for line in lines] == [
        ("good", "H", {"b": 2})
    ]
    again = {"good": fail, "bad": lambda: 3.0}
    assert gpu.measure(again, 1.0, "H", gpu.Lines(store.path)) == {"good": {"b": 2}, "bad": 3.0}
