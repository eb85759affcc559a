"""sketch, runs and run_report: gauge invariance, known signals, and a real run from the command line."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lowrank_geo import geometry
from lowrank_geo.analysis import linear
from lowrank_geo.analysis.momenta import momentum_named
from lowrank_geo.analysis.run_report import run_report
from lowrank_geo.analysis.runs import (
    Recorded,
    edge_share,
    read_sketches,
    signal_to_noise,
    smoothness,
    spectrum,
)
from lowrank_geo.analysis.two_step import two_step
from lowrank_geo.cli.app import app
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.models.decoder import DecoderConfig
from lowrank_geo.models.presets import DECODERS
from lowrank_geo.optim import RiemannianSGD, ScheduleFree, param_groups
from lowrank_geo.optim.filters import HeavyBall
from lowrank_geo.sketch import Sketch


def layer_of_a_loss(count=4):
    model = nn.Sequential(
        LowRankLinear(7, 6, 3, bias=False), LowRankLinear(6, 4, 2, bias=False)
    ).double()
    param_groups(model)
    model(torch.randn(5, 7, dtype=torch.float64)).square().sum().backward()
    return model, Sketch(model, count, seed=1)


def test_a_sketch_is_the_product_with_dense_probes():
    model, sketch = layer_of_a_loss()
    weights, gradients = torch.zeros(4).double(), torch.zeros(4).double()
    for layer, [(a, b)] in zip(model, sketch.probes, strict=True):
        point = geometry.Point(*(p.detach() for p in layer.point))
        xi = geometry.Tangent(layer.U.grad, layer.S.grad, layer.V.grad)
        for i in range(4):
            R = torch.outer(a[i], b[i])
            weights[i] += (R * geometry.to_dense(point)).sum()
            gradients[i] += (R * geometry.embed(point, xi)).sum()
    assert torch.allclose(sketch.weights(), weights)
    assert torch.allclose(sketch.gradients(), gradients)


def test_a_sketch_does_not_see_the_frames():
    model, sketch = layer_of_a_loss()
    before = sketch.weights(), sketch.gradients()
    for layer in model:
        r = layer.rank
        P, Q = (torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0] for _ in range(2))
        U, S, V = layer.point
        turned = ((U, U.data @ P, U.grad @ Q), (V, V.data @ Q, V.grad @ P))
        turned += ((S, P.mT @ S.data @ Q, P.mT @ S.grad @ Q),)
        for parameter, value, grad in turned:
            parameter.data, parameter.grad = value, grad
    assert torch.allclose(sketch.weights(), before[0])
    assert torch.allclose(sketch.gradients(), before[1])


def test_a_sketch_of_factors_is_that_of_u_s_and_v():
    model = nn.Sequential(LowRankLinear(7, 6, 3), LowRankLinear(6, 4, 2)).double()
    model(torch.randn(5, 7, dtype=torch.float64)).square().sum().backward()
    sketch = Sketch(model, 4)
    weights, gradients = torch.zeros(4).double(), torch.zeros(4).double()
    for layer, probes in zip(model, sketch.probes, strict=True):
        for X, (a, b) in zip(layer.point, probes, strict=True):
            R = torch.einsum("km,kn->kmn", a, b)
            weights += (R * X.detach()).sum((1, 2))
            gradients += (R * X.grad).sum((1, 2))
    assert torch.allclose(sketch.weights(), weights)
    assert torch.allclose(sketch.gradients(), gradients)


def test_a_sketch_estimates_norms():
    model, sketch = layer_of_a_loss(20_000)
    exact = sum(float(layer.S.detach().square().sum()) for layer in model)
    assert float(sketch.weights().square().mean()) == pytest.approx(exact, rel=0.06)


def test_a_sketch_refuses_what_it_cannot_see():
    model, _ = layer_of_a_loss()
    with pytest.raises(ValueError, match="count >= 1, got 0"):
        Sketch(model, 0)
    with pytest.raises(ValueError, match="a model with low-rank layers, got none"):
        Sketch(nn.Sequential(nn.Linear(3, 3)), 4)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_the_signal_to_noise_of_a_known_mixture(ratio):
    rng = np.random.default_rng(0)
    found = np.sqrt(ratio) * rng.standard_normal(64) + rng.standard_normal((4000, 64))
    assert signal_to_noise(found) == pytest.approx(ratio, rel=0.3)
    assert signal_to_noise(rng.standard_normal((4000, 64))) < 0.01


def test_the_spectrum_finds_a_frequency_and_is_flat_for_noise():
    t = np.arange(640)[:, None]
    omega, power = spectrum(np.cos(np.pi / 4 * t + np.arange(3)))
    assert power.sum() == pytest.approx(1) and omega[power.argmax()] == pytest.approx(np.pi / 4)
    assert power[6:11].sum() > 0.99
    _, flat = spectrum(np.random.default_rng(0).standard_normal((6400, 16)))
    assert flat[1:-1] == pytest.approx(np.full(31, 1 / 32), rel=0.15)


def test_the_smoothness_and_edge_of_a_real_run_on_a_quadratic():
    """The real optimizer where the curvature is 3 in all directions."""
    x = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer, points = RiemannianSGD([x], lr=0.1, momentum=0.5), []
    for _ in range(60):
        points.append(x.detach().numpy().copy())
        x.grad = 3 * x.detach()
        optimizer.step()
    w = np.array(points)
    at, found = smoothness(Recorded(np.arange(60), np.full(60, 0.1), 3 * w, w), 10)
    assert len(at) == 5 and found == pytest.approx(np.full(5, 3.0))
    assert edge_share(HeavyBall(0.5), 1, 0.1, 3.0) == pytest.approx(0.1)


def recorded_run(folder, optimizer, lr, steps=80):
    """A real run with sketches, on a tiny decoder."""
    text = folder / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 400, encoding="utf-8")
    tiny = DecoderConfig(vocab_size=257, width=16, layers=1, heads=2, hidden=24, context=16)
    options = {
        "data": text, "model": "tiny", "optimizer": optimizer, "lr": lr, "steps": steps, "batch": 4, "budget": 0.9,
        "probes": 8, "diagnose-every": 10, "eval-every": 0, "out": folder / "run",
    }  # fmt: skip
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DECODERS, "tiny", tiny)
        result = CliRunner().invoke(app, ["pretrain", *arguments])
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded_run(tmp_path_factory.mktemp("runs"), "sgd", 0.3)


@pytest.mark.parametrize(
    "optimizer, lr, edge", [("adamw", 0.003, False), ("schedule-free-sgd", 0.3, True)]
)
def test_runs_of_torch_and_of_schedule_free_are_analysed_too(tmp_path, optimizer, lr, edge):
    folder = recorded_run(tmp_path, optimizer, lr, steps=40)
    report = run_report(folder)
    numbers = {what: value for what, value, _ in report.numbers}
    assert {"signal to noise", "curvature along the steps", "after the momentum"} < set(numbers)
    assert ("share of the edge" in numbers) is edge
    assert read_sketches(folder).gradients.any(axis=1).all()


@pytest.mark.parametrize("lam, lives", [(0.98, True), (1.02, False)])
def test_the_edge_of_schedule_free_is_where_the_real_one_diverges(lam, lives):
    """Late in a run, when the average hardly moves: weights of t^8 would move it, uniform ones do not."""
    filter, plain = momentum_named("schedule-free-sgd", 10)
    edge = linear.largest_step(two_step(filter))
    assert plain and edge == pytest.approx(20)
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = ScheduleFree(RiemannianSGD([x], lr=1e-3, momentum=0.0), weights="uniform")
    optimizer.train()
    sizes = []
    for step in range(3200):
        if step == 3000:
            optimizer.state[x]["z"].add_(1.0)
            optimizer.eval()
            optimizer.train()
            optimizer.param_groups[0]["lr"] = lam * edge
        x.grad = x.detach().clone()
        optimizer.step()
        sizes.append(abs(float(optimizer.state[x]["z"])))
    assert (sizes[-1] < sizes[3010]) is lives


def test_the_momentum_of_an_augmented_basis_is_refused():
    with pytest.raises(ValueError, match="got 'dlrt-adam'; augmented bases"):
        momentum_named("dlrt-adam", 10)


def test_a_run_is_analysed(run, tmp_path):
    recorded = read_sketches(run)
    assert recorded.gradients.shape == recorded.weights.shape == (80, 8)
    numbers = {what: value for what, value, _ in run_report(run).numbers}
    assert {
        "signal to noise",
        "curvature along the steps",
        "share of the edge",
        "transport τ",
    } < set(numbers)
    assert 0 < float(numbers["transport τ"]) <= 1.0001
    out = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["analyze", "run", str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_text(encoding="utf-8").count("<svg ") == 3


def test_a_run_without_sketches_is_refused(run, tmp_path):
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if "gradient_sketch" not in json.loads(line)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(kept))
    result = CliRunner().invoke(app, ["analyze", "run", str(tmp_path)])
    assert result.exit_code == 2 and "got 0 in" in result.output and "--probes 16" in result.output
    result = CliRunner().invoke(app, ["analyze", "run", str(tmp_path / "nothing")])
    assert result.exit_code == 2 and "a run needs a folder" in result.output
