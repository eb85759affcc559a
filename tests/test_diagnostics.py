"""diagnostics: the definitions against dense float64 oracles, on linear and convolutional layers."""

import json
import math

import pytest
import torch
from torch import nn

from lowrank_geo import diagnostics
from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.layers import LowRankLinear


@pytest.fixture
def model() -> nn.Sequential:
    model = nn.Sequential(
        LowRankLinear(7, 5, rank=3),
        nn.Linear(5, 5),
        LowRankLinear(5, 9, rank=3),
        LowRankConv2d(2, 6, 3, rank=4),
        LowRankLinear(6, 4, rank=1),
    )
    for name, factor in model.named_parameters():
        if name.endswith("S"):
            nn.init.normal_(factor)
    return model


def test_spectra_are_the_singular_values_of_the_dense_weight(model):
    spectra = diagnostics.spectra(model)
    assert list(spectra) == ["0", "2", "3", "4"]
    for name, values in spectra.items():
        layer = model[int(name)]
        U, S, V = (factor.detach().double() for factor in layer.point)
        oracle = torch.linalg.svdvals(U @ S @ V.mT)
        assert values.dtype == torch.float64 and values.shape == (layer.rank,)
        # 10 x the worst of 200 draws: U and V are orthonormal only to float32.
        assert torch.allclose(values, oracle[: layer.rank], rtol=0, atol=5e-6)
        assert (values.diff() <= 0).all()


def test_one_decomposition_serves_all_layers_of_a_shape(model, monkeypatch):
    shapes = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: shapes.append(x.shape) or svdvals(x))
    diagnostics.spectra(model)
    assert sorted(map(tuple, shapes)) == [(1, 1, 1), (1, 4, 4), (2, 3, 3)]


def test_a_broken_layer_does_not_hide_the_others(model):
    with torch.no_grad():
        model[0].S[1, 1] = torch.nan
        model[0].U[0, 0] = torch.nan
    spectra, drifts = diagnostics.spectra(model), diagnostics.orthonormality(model)
    assert spectra["0"].isnan().all() and spectra["2"].isfinite().all()
    assert math.isnan(drifts["0"]) and drifts["2"] < 1e-6


def test_snapshot_of_a_broken_layer_is_strict_json(model):
    with torch.no_grad():
        model[0].S[1, 1] = model[0].U[0, 0] = torch.nan
    snapshot = diagnostics.snapshot(model)
    assert json.loads(json.dumps(snapshot, allow_nan=False)) == snapshot
    assert snapshot["spectra"]["0"] == [None] * 3 and snapshot["orthonormality"]["0"] is None
    assert all(snapshot["spectra"]["2"])


def test_orthonormality_is_the_worse_of_the_two_frames(model):
    with torch.no_grad():
        model[0].V[:, 2] *= 1.1
        model[2].U[:, 0] *= 0.9
    drifts = diagnostics.orthonormality(model)
    assert drifts["0"] == pytest.approx(0.21, abs=1e-5)
    assert drifts["2"] == pytest.approx(0.19, abs=1e-5)
    assert drifts["3"] < 1e-6 and drifts["4"] < 1e-6


def test_a_shared_layer_appears_once():
    layer = LowRankLinear(4, 4, rank=2)
    assert list(diagnostics.spectra(nn.Sequential(layer, layer))) == ["0"]


def test_a_dense_model_has_nothing_to_report():
    empty = {"ranks": {}, "spectra": {}, "orthonormality": {}, "transport": {}}
    assert diagnostics.snapshot(nn.Sequential(nn.Linear(2, 2))) == empty


def test_snapshot_survives_json_and_reads_the_transports(model):
    class Optimizer:
        def transports(self) -> dict[str, torch.Tensor]:
            return {"0": torch.tensor(0.5)}

    snapshot = diagnostics.snapshot(model, Optimizer())
    assert json.loads(json.dumps(snapshot)) == snapshot
    assert snapshot["ranks"] == {"0": 3, "2": 3, "3": 4, "4": 1}
    assert snapshot["transport"] == {"0": 0.5}
    exact = diagnostics.spectra(model)["3"].tolist()
    assert snapshot["spectra"]["3"] == pytest.approx(exact, rel=1e-5)


def test_an_optimizer_without_transports_is_accepted(model):
    adam = torch.optim.Adam(model.parameters())
    assert diagnostics.snapshot(model, adam)["transport"] == {}


def test_snapshot_leaves_parameters_and_gradients_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnostics.snapshot(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
