"""replacement: the same function before and after, for every kind of layer, both ways."""

import copy

import pytest
import torch
from tiny_models import relative
from torch import nn

from lowrank_geo.convert import convert, to_dense, to_factors
from lowrank_geo.layers import LowRankLinear, lowrank_layers
from lowrank_geo.replacement import TwoFactors

TOL = {
    torch.float64: 5e-14,
    torch.float32: 3e-6,
}  # 10 x the worst of 20 draws of all cases, relative


def truncate(weight, rank):
    """Make a weight have exactly this rank."""
    with torch.no_grad():
        U, sigma, Vt = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        weight.copy_(((U[:, :rank] * sigma[:rank]) @ Vt[:rank]).reshape(weight.shape))


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(24, 16)


LAYERS = {
    "linear": (lambda: nn.Linear(16, 24), (3, 5, 16)),
    "no bias": (lambda: nn.Linear(16, 24, bias=False), (2, 16)),
    "conv1d": (conv1d, (3, 5, 16)),
    "conv2d": (lambda: nn.Conv2d(5, 24, 3, stride=2, padding=(1, 0), dilation=2), (2, 5, 12, 11)),
    "same": (lambda: nn.Conv2d(5, 24, (4, 3), padding="same", bias=False), (2, 5, 9, 8)),
    "reflect": (lambda: nn.Conv2d(5, 24, 3, padding=2, padding_mode="reflect"), (2, 5, 9, 8)),
    "pointwise": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 3, 3)),
}


# torch says of its own dense convolution that padding="same" may copy the input.
COPY = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(params=[pytest.param(n, marks=COPY) if n == "same" else n for n in LAYERS])
def layer(request):
    """A dense layer in float64 of rank 4, and an input for it."""
    build, shape = LAYERS[request.param]
    dense = build().double()
    truncate(dense.weight, 4)
    return dense, torch.randn(shape, dtype=torch.float64)


def test_weight_of_the_rank_of_the_plan_gives_the_same_function(layer):
    dense, x = layer
    model = convert(nn.Sequential(copy.deepcopy(dense)), rank=4)
    assert relative(model(x), dense(x)) < TOL[torch.float64]
    assert model.lowrank_plan.entries[0].error < TOL[torch.float64]


@pytest.mark.parametrize("back", [to_dense, to_factors])
def test_way_back_computes_the_same_without_our_layers(layer, back):
    dense, x = layer
    model = convert(nn.Sequential(copy.deepcopy(dense)), rank=3)
    wanted = model(x)
    assert back(model) is model and not list(lowrank_layers(model))
    assert relative(model(x), wanted) < TOL[torch.float64]
    assert not hasattr(model, "lowrank_plan")


def test_to_dense_restores_type_names_and_settings(layer):
    dense, _ = layer
    model = to_dense(convert(nn.Sequential(copy.deepcopy(dense)), rank=4))
    assert type(model[0]) is type(dense)
    assert {k: v.shape for k, v in model[0].state_dict().items()} == {
        k: v.shape for k, v in dense.state_dict().items()
    }
    if isinstance(dense, nn.Conv2d):
        for name in ("stride", "dilation", "padding_mode", "kernel_size", "padding"):
            assert getattr(model[0], name) == getattr(dense, name)


def test_to_factors_is_two_layers_whose_weight_can_be_read(layer):
    dense, _ = layer
    pair = to_factors(convert(nn.Sequential(copy.deepcopy(dense)), rank=4))[0]
    assert isinstance(pair, TwoFactors) and len(pair) == 2 and pair[0].bias is None
    assert relative(pair.weight, dense.weight) < TOL[torch.float64]
    assert (pair.bias is None) == (dense.bias is None)


@pytest.mark.parametrize("back", [to_dense, to_factors])
def test_way_back_refuses_to_lose_a_hook(back):
    model = convert(nn.Sequential(nn.Linear(16, 16)), rank=2)
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"{back.__name__} needs layers without hooks"):
        back(model)
    assert isinstance(model[0], LowRankLinear)


@pytest.mark.parametrize("after", [lambda model: model, to_dense, to_factors])
def test_transformer_layer_runs_its_fused_evaluation(after):
    model = convert(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), ratio=0.25).eval()
    x = torch.randn(2, 3, 16)
    wanted = model(x)  # with gradients: the plain path
    with torch.no_grad():
        assert relative(after(model)(x), wanted) < TOL[torch.float32]
