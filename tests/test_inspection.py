"""inspection: measures against dense oracles, a refusal for everything that does not belong together."""

import json
import math
import os

import pytest
import torch
from rich.console import Console

from lowrank_geo import inspection
from lowrank_geo.inspection import inspect, render
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.train import checkpoint

SHAPES = {"blocks.2.q": (8, 6, 3), "blocks.10.q": (5, 9, 5), "blocks.2.up": (7, 6, 1)}
RECORD = {"format": "lowrank_geo run", "version": 1, "status": "finished"}


@pytest.fixture
def layers():
    made = {name: LowRankLinear(n, m, r, bias=False) for name, (m, n, r) in SHAPES.items()}
    for layer in made.values():
        torch.nn.init.normal_(layer.S)
    return made


@pytest.fixture
def run(tmp_path, layers):
    """A run with two checkpoints, of which the older one is of zeros."""
    tensors = {f"{n}.{f}": getattr(x, f).detach() for n, x in layers.items() for f in "USV"}
    tensors |= {"embed.weight": torch.zeros(4, 3), "norm.weight": torch.zeros(6).half()}
    write(tmp_path, {key: torch.zeros_like(x) for key, x in tensors.items()}, step=90)
    write(tmp_path, tensors, step=100)
    return tmp_path


def write(run, tensors, *, step=100, plan=True, names=SHAPES):
    entries = [
        {"name": n, "m": SHAPES[n][0], "n": SHAPES[n][1], "rank": SHAPES[n][2]} for n in names
    ]
    dense = {"name": "embed", "m": 4, "n": 3, "rank": None}
    record = RECORD | ({"plan": {"entries": [*entries, dense]}} if plan else {})
    (run / "run.json").write_text(json.dumps(record))
    model = {key: x.contiguous() for key, x in tensors.items()}
    checkpoint.save(run / "checkpoints", checkpoint.Checkpoint(step, model, {}))


def test_the_newest_checkpoint_is_measured_in_the_order_of_the_plan(run, layers):
    found = inspect(run)
    assert (found.step, found.status) == (100, "finished")
    assert [layer.name for layer in found.layers] == list(SHAPES)
    for got in found.layers:
        U, S, V = (x.detach().double() for x in layers[got.name].point)
        sigma = torch.linalg.svdvals(U @ S @ V.mT)[: got.rank]
        assert (got.m, got.n, got.rank) == SHAPES[got.name]
        # 10 x the worst of 200 draws: U and V are orthonormal only to float32.
        assert got.sigma == pytest.approx(sigma.tolist(), abs=5e-6)
        assert got.stable_rank == pytest.approx((sigma.norm() / sigma[0]).item() ** 2, rel=1e-5)
        p = sigma / sigma.sum()
        assert got.effective_rank == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-5)
        assert 0 < got.drift < 1e-6


def test_equal_singular_values_count_fully(tmp_path, layers):
    tensors = {f"{n}.{f}": getattr(x, f).detach() for n, x in layers.items() for f in "USV"}
    write(
        tmp_path, {k: 2 * torch.eye(len(x)) if k.endswith("S") else x for k, x in tensors.items()}
    )
    for layer in inspect(tmp_path).layers:
        assert layer.effective_rank == pytest.approx(layer.rank)
        assert layer.stable_rank == pytest.approx(layer.rank)


def test_counts_are_those_of_the_model_and_of_it_multiplied_out(run):
    found = inspect(run)
    factors = sum(r * (m + n + r) for m, n, r in SHAPES.values())
    matrices = sum(m * n for m, n, _ in SHAPES.values())
    assert (found.parameters, found.dense_parameters) == (factors + 18, matrices + 18)
    assert (found.bytes, found.dense_bytes) == (4 * factors + 60, 4 * matrices + 60)


def test_a_core_of_zeros_has_no_rank(run):
    os.rename(run / "checkpoints" / "step-00000100", run / "checkpoints" / ".step-00000100.part")
    found = inspect(run)
    assert found.step == 90
    assert all(x.effective_rank == x.stable_rank == 0 and x.drift == 1 for x in found.layers)
    assert "σ max" in text(found)


def test_a_core_that_is_not_finite_is_shown_and_not_fatal(run, layers):
    tensors = {f"{n}.{f}": getattr(x, f).detach() for n, x in layers.items() for f in "USV"}
    tensors["blocks.2.q.S"] = torch.full((3, 3), math.nan)
    write(run, tensors)
    found = inspect(run)
    assert math.isnan(found.layers[0].sigma[0]) and found.layers[1].sigma[0] > 0
    assert "nan" in text(found)


def test_without_a_plan_layers_come_in_natural_order(run, layers):
    tensors = {f"{n}.{f}": getattr(x, f).detach() for n, x in layers.items() for f in "USV"}
    write(run, tensors, plan=False)
    names = [layer.name for layer in inspect(run).layers]
    assert names == ["blocks.2.q", "blocks.2.up", "blocks.10.q"]


def test_inspect_writes_nothing(run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    text(inspect(run))
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_shapes_are_compared_with_the_plan_before_a_tensor_is_read(run, layers, monkeypatch):
    tensors = {f"{n}.{f}": getattr(x, f).detach() for n, x in layers.items() for f in "USV"}
    tensors["blocks.10.q.V"] = torch.zeros(4, 5)
    write(run, tensors)
    monkeypatch.setattr(inspection, "_layer", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=r"5x9 layer 'blocks.10.q' of rank 5, got .*V \(4, 5\)"):
        inspect(run)


def test_a_layer_of_the_plan_that_is_not_in_the_checkpoint_is_refused(run):
    write(run, {"embed.weight": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match=r"'blocks.10.q' of rank 5, got U \(\), S \(\), V \(\)"):
        inspect(run)


def test_factors_of_rank_0_are_refused(run):
    tensors = {"x.U": torch.zeros(3, 0), "x.S": torch.zeros(0, 0), "x.V": torch.zeros(2, 0)}
    write(run, tensors, plan=False)
    with pytest.raises(ValueError, match="of rank 0"):
        inspect(run)


def test_a_truncated_checkpoint_is_passed_over_with_one_sentence(run):
    file = run / "checkpoints" / "step-00000100" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    found = inspect(run)
    assert found.step == 90 and found.layers[0].sigma[0] == 0
    assert "passed over: checkpoint file" in text(found) and "step-00000100" in text(found)
    file.unlink()
    assert inspect(run).step == 90


def test_a_run_without_a_valid_checkpoint_is_one_sentence(run):
    for file in run.rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="checkpoint file .*step-00000100.* holds no valid one"):
        inspect(run)


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    with pytest.raises(FileNotFoundError, match="inspect needs a run with a checkpoint"):
        inspect(tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run.json"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    "plan", [None, [], {"entries": 3}, {"entries": [{"name": 3, "rank": 2}, 7]}]
)
def test_a_plan_that_is_none_is_ignored(run, plan):
    (run / "run.json").write_text(json.dumps(RECORD | {"plan": plan}))
    assert len(inspect(run).layers) == 3


def text(found, width=200):
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(render(found))
    return captured.get()


def test_render_names_every_layer_and_the_totals(run):
    shown, found = text(inspect(run)), inspect(run)
    assert all(name in shown for name in SHAPES)
    assert f"parameters: {found.parameters:,} of {found.dense_parameters:,}" in shown
    assert f"bytes: {found.bytes:,}" in shown


def test_render_fits_80_columns_with_names_of_a_transformer(tmp_path):
    factors = {"U": torch.eye(768, 9), "S": torch.eye(9) / 3, "V": torch.eye(2048, 9)}
    names = ["blocks.0.attention.q", "blocks.0.attention.k"]
    write(tmp_path, {f"{n}.{f}": x.clone() for n in names for f, x in factors.items()}, plan=False)
    rows = [row for row in text(inspect(tmp_path), width=80).splitlines() if "█" in row]
    assert [row.split()[0] for row in rows] == sorted(names)
    assert rows[0].split()[1:4] == ["768x2048", "9", "0.333"] and max(map(len, rows)) <= 80


def test_render_obeys_no_name(tmp_path):
    name = "[bold]a\x1b[31m[/nonsense]"
    factors = {"U": torch.eye(3, 1), "S": torch.ones(1, 1), "V": torch.eye(2, 1)}
    write(tmp_path, {f"{name}.{key}": x for key, x in factors.items()}, plan=False)
    shown = text(inspect(tmp_path))
    assert "[bold]a\ufffd[31m[/nonsense]" in shown and "\x1b" not in shown


def test_the_picture_of_a_spectrum_falls_from_full_to_empty():
    assert inspection._bars((1.0, 0.8, 0.6, 0.3, 0.0)) == "█▇▅▃▁"
    assert len(inspection._bars(tuple(range(100, 0, -1)))) == inspection.CELLS
