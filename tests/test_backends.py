"""Training on the Triton backend, in the interpreter or on a GPU: the losses of the torch backend, to rounding."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE
from torch.profiler import ProfilerActivity, profile

import lowrank_geo
from lowrank_geo import dispatch
from lowrank_geo.models.decoder import Decoder, DecoderConfig
from lowrank_geo.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD, param_groups

RULES = {
    "muon": (
        lambda groups: RiemannianMuon(groups, lr=0.02),
        {"retract", "transport", "damped_factor", "apply"},
    ),
    "muon, product": (
        lambda groups: RiemannianMuon(groups, lr=0.02, metric="product"),
        {"polar", "spectral"},
    ),
    "adam": (lambda groups: RiemannianAdam(groups, lr=0.01), {"retract", "transport"}),
    "sgd, splitting": (
        lambda groups: RiemannianSGD(groups, lr=0.1, retraction="splitting"),
        {"retract", "transport"},
    ),
}


def decoder(layers=1):
    config = DecoderConfig(vocab_size=17, width=12, layers=layers, heads=2, hidden=20, context=8)
    torch.manual_seed(0)
    model = Decoder(config)
    lowrank_geo.convert(model, rank=3, init="orthogonal")
    return model.to(DEVICE)


def losses(backend, make, steps=3):
    with dispatch.use_backend(backend):
        model = decoder()
        optimizer = make(param_groups(model))
        tokens = torch.arange(2 * 9).reshape(2, 9).to(DEVICE) * 5 % 17
        found = []
        for _ in range(steps):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found


THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize(
    "make, used",
    [
        pytest.param(*rule, marks=[] if name in ("muon", "muon, product") else [THOROUGH], id=name)
        for name, rule in RULES.items()
    ],
)
def test_both_backends_train_alike(make, used, monkeypatch):
    called = set()
    load = dispatch._kernel
    monkeypatch.setattr(dispatch, "_kernel", lambda name: called.add(name) or load(name))
    found, wanted = losses("triton", make), losses("torch", make)
    assert called >= {"lowrank_linear", "tangent", *used}
    assert found == pytest.approx(wanted, rel=2e-5)
    assert wanted[-1] < wanted[0]


def operations(layers, make):
    """How many torch operations one step calls; the interpreter's own work is inside of ours."""
    with dispatch.use_backend("triton"):
        model = decoder(layers)
        optimizer = make(param_groups(model))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            optimizer.step()
    names = [event.name for event in found.events()]
    return sum(name.startswith("lowrank_geo::") for name in names)


@pytest.mark.parametrize("name", ["muon", pytest.param("muon, product", marks=THOROUGH)])
def test_the_number_of_operators_does_not_depend_on_depth(name):
    make, _ = RULES[name]
    assert operations(1, make) == operations(2, make) > 0
