"""layers: drop-in for nn.Linear, everything that copies, moves, saves and loads modules, refusals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import best_approximation, dense, orthonormality, tangent_projection
from safetensors.torch import load_model, save_model
from torch import nn
from torch.func import functional_call

from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.geometry import Tangent, embed, project
from lowrank_geo.layers import LowRankLinear, lowrank_layers

MODES = ["factors", "tangent"]


def linear(mode="factors", dtype=torch.float64, bias=True):
    layer = LowRankLinear(5, 7, 3, bias, dtype=dtype)
    layer.gradient = mode
    return layer


def convolution(mode="factors", dtype=torch.float64, bias=True):
    layer = LowRankConv2d(2, 7, 3, 4, bias, padding=1, stride=2, dtype=dtype)
    layer.gradient = mode
    return layer


LAYERS = {
    "linear": (linear, lambda dtype: torch.randn(4, 5, dtype=dtype)),
    "convolution": (convolution, lambda dtype: torch.randn(2, 2, 6, 6, dtype=dtype)),
}
each_layer = pytest.mark.parametrize("make, draw", LAYERS.values(), ids=LAYERS)


def gradients(layer, x):
    layer.zero_grad()
    layer(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def assert_same(a, b, x):
    """Same output and same gradients, bit for bit."""
    assert a.gradient == b.gradient and torch.equal(a(x), b(x))
    found, expected = gradients(a, x), gradients(b, x)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("m, n", [(7, 5), (5, 7), (6, 6), (1, 4)])
def test_full_rank_layer_equals_nn_linear(m, n, bias):
    twin = nn.Linear(n, m, bias, dtype=torch.float64)
    layer = LowRankLinear.from_weight(twin.weight, twin.bias, min(m, n))
    x = torch.randn(4, n, dtype=torch.float64)
    assert (layer(x) - twin(x)).abs().max() < 1e-14
    assert (layer.weight - twin.weight).abs().max() < 1e-14
    assert (layer.bias is None) == (not bias)
    assert (layer.in_features, layer.out_features, layer.rank) == (n, m, min(m, n))


def test_full_rank_convolution_equals_nn_conv2d():
    twin = nn.Conv2d(2, 7, 3, stride=2, padding=1, padding_mode="circular", dtype=torch.float64)
    layer = LowRankConv2d.from_convolution(twin, 7)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    assert (layer(x) - twin(x)).abs().max() < 1e-14
    assert (layer.weight - twin.weight).abs().max() < 1e-14


def test_given_weight_is_approximated_and_not_shared():
    W, bias = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    layer = LowRankLinear.from_weight(W, bias, 2)
    assert (layer.weight - best_approximation(W, 2)).norm() < 1e-13
    expected = bias.clone()
    with torch.no_grad():
        layer.bias.add_(1)
    assert torch.equal(bias, expected)


@each_layer
@pytest.mark.parametrize("bias", [True, False])
def test_new_layer_is_orthonormal_and_of_the_variance_of_the_dense_one(make, draw, bias):
    layer = make(bias=bias)
    assert max(orthonormality(layer.U), orthonormality(layer.V)) < 1e-14
    names = ["U", "S", "V", "bias"] if bias else ["U", "S", "V"]
    assert sorted(name for name, _ in layer.named_parameters()) == sorted(names)
    assert all(p.is_contiguous() and p.requires_grad for p in layer.parameters())
    # U(−1/√n, 1/√n) has the standard deviation 1/√(3n).
    n = layer.V.shape[0]
    assert layer.weight.std().item() == pytest.approx((3 * n) ** -0.5, rel=0.3)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_weight_is_dense_and_differentiable_with_the_gradient_of_the_mode(mode, transposed):
    layer = LowRankLinear.from_weight(torch.randn(7, 5).double(), None, 3, transposed=transposed)
    layer.gradient = mode
    G = torch.randn(7, 5, dtype=torch.float64)
    weight = layer.weight.mT if transposed else layer.weight
    assert weight.shape == (7, 5) and (weight - dense(layer.point)).abs().max() < 1e-14
    (G * weight).sum().backward()
    U, S, V = (p.detach() for p in layer.point)
    if mode == "tangent":
        expected = project(layer.point, G)
    else:
        expected = (G @ V @ S.mT, U.mT @ G @ V, G.mT @ U @ S)
    for p, wanted in zip(layer.point, expected, strict=True):
        assert (p.grad - wanted).norm() < 1e-13


@each_layer
def test_weight_has_the_layout_of_the_dense_module_and_ignores_autocast(make, draw):
    layer = make(dtype=torch.float32)
    shape = (7, 5) if make is linear else (7, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.shape == shape and layer.weight.dtype == torch.float32
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(shape)


@each_layer
@pytest.mark.parametrize("mode", MODES)
def test_layer_used_twice_sums_the_gradients(make, draw, mode):
    layer, x, z = make(mode), draw(torch.float64), draw(torch.float64)
    alone = [gradients(layer, x), gradients(layer, z)]
    layer.zero_grad()
    (layer(x).square().sum() + layer(z).square().sum()).backward()
    for name, p in layer.named_parameters():
        expected = alone[0][name] + alone[1][name]
        assert (p.grad - expected).norm() < 1e-13 * expected.norm()


def test_layer_used_twice_in_one_chain_projects_the_summed_dense_gradient():
    layer = LowRankLinear(6, 6, 2, dtype=torch.float64)
    layer.gradient = "tangent"
    x, W = torch.randn(3, 6, dtype=torch.float64), dense(layer.point).requires_grad_()
    F.linear(F.linear(x, W, layer.bias).tanh(), W, layer.bias).square().sum().backward()
    layer.zero_grad()
    layer(layer(x).tanh()).square().sum().backward()
    xi = Tangent(*(p.grad for p in layer.point))
    expected = tangent_projection(layer.point, W.grad)
    assert (embed(layer.point, xi) - expected).norm() < 1e-12 * W.grad.norm()


def test_clipping_clips_the_riemannian_norm():
    layer = linear("tangent", bias=False)
    x = torch.randn(9, 5, dtype=torch.float64)
    W = dense(layer.point).requires_grad_()
    F.linear(x, W).square().sum().backward()
    gradients(layer, x)
    size = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    assert size.item() == pytest.approx(tangent_projection(layer.point, W.grad).norm().item())


@each_layer
@pytest.mark.parametrize("mode", MODES)
def test_unused_layer_has_no_gradient(make, draw, mode):
    used, unused = make(mode), make(mode)
    used(draw(torch.float64)).sum().backward()
    assert all(p.grad is None for p in unused.parameters())
    assert all(p.grad is not None for p in used.parameters())


@each_layer
@pytest.mark.parametrize("mode", MODES)
def test_deepcopy_and_pickle_copy_everything(make, draw, mode):
    layer, x = make(mode), draw(torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(other, layer, x)
        assert repr(other) == repr(layer)
        assert not {p.data_ptr() for p in other.point} & {p.data_ptr() for p in layer.point}


@each_layer
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_state_dict_round_trip_is_strict_and_exact(make, draw, mode, assign):
    layer, other, x = make(mode), make(mode), draw(torch.float64)
    state = layer.state_dict()
    assert set(state) == {"U", "S", "V", "bias"}
    other.load_state_dict({name: v.clone() for name, v in state.items()}, assign=assign)
    assert_same(other, layer, x)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"U": state["U"]})
    with pytest.raises(RuntimeError, match="size mismatch for S"):
        other.load_state_dict({**state, "S": torch.zeros(2, 2)})


@each_layer
@pytest.mark.parametrize("mode", MODES)
def test_safetensors_round_trip_is_exact(make, draw, mode, tmp_path):
    model, other = nn.Sequential(make(mode)), nn.Sequential(make(mode))
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert_same(other[0], model[0], draw(torch.float64))


@each_layer
@pytest.mark.parametrize("mode", MODES)
def test_functional_call_uses_the_given_parameters(make, draw, mode):
    layer, other, x = make(mode), make(mode), draw(torch.float64)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    y = functional_call(layer, given, (x,))
    assert torch.equal(y, other(x))
    y.square().sum().backward()
    expected = gradients(other, x)
    assert all(torch.equal(given[name].grad, expected[name]) for name in given)
    assert all(p.grad is None for p in layer.parameters())


@each_layer
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_low_precision_casts_leave_the_factors_in_float32(make, draw, mode, cast):
    layer = make(mode, torch.float32)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    gradients(layer, draw(torch.float32))
    model = getattr(nn.Sequential(layer), cast)()
    low = model[0].bias.dtype
    assert low.itemsize == 2
    for name in ("U", "S", "V"):
        p = getattr(layer, name)
        assert torch.equal(p, before[name]) and p.grad.dtype == torch.float32
    x = draw(low)
    assert model(x).dtype == low
    found = gradients(layer, x)
    assert all(found[name].dtype == torch.float32 for name in ("U", "S", "V"))
    layer.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    layer.to(torch.bfloat16)
    assert all(p.dtype == torch.float64 for p in layer.point)


@each_layer
def test_new_layer_of_low_precision_has_factors_in_float32(make, draw):
    layer = make(dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in layer.point) and layer.bias.dtype == torch.bfloat16
    assert layer(draw(torch.bfloat16)).dtype == torch.bfloat16


@each_layer
@pytest.mark.parametrize("mode", MODES)
def test_layer_on_meta_has_shapes_and_becomes_real(make, draw, mode):
    real, x = make(mode), draw(torch.float64)
    with torch.device("meta"):
        layer = make(mode)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(x.to("meta")).shape == real(x).shape
    assert layer.weight.is_meta and layer.weight.shape == real.weight.shape
    layer.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert_same(layer, real, x)
    with torch.device("meta"):
        layer = make(mode)
    layer.load_state_dict(real.state_dict(), assign=True)
    assert_same(layer, copy.deepcopy(real), x)


class NaiveLinear(nn.Module):
    """What a user would write: three parameters and their product, applied from the right."""

    def __init__(self, layer):
        super().__init__()
        self.U, self.S, self.V, self.bias = (
            nn.Parameter(p.detach().clone()) for p in (*layer.point, layer.bias)
        )

    def forward(self, x):
        if x.shape[0] >= self.U.shape[0]:
            return F.linear(x @ self.V, self.U @ self.S, self.bias)
        return F.linear(x @ self.V @ self.S.mT, self.U, self.bias)


@pytest.mark.parametrize("tokens", [3, 40])
def test_factors_mode_with_adamw_equals_the_naive_model_bit_for_bit(tokens):
    layers = [LowRankLinear(6, 8, 3), LowRankLinear(8, 5, 2)]
    ours = nn.Sequential(layers[0], nn.GELU(), layers[1])
    naive = nn.Sequential(NaiveLinear(layers[0]), nn.GELU(), NaiveLinear(layers[1]))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (ours, naive)]
    for _ in range(20):
        x, target = torch.randn(tokens, 6), torch.randn(tokens, 5)
        for model, optimizer in zip((ours, naive), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
    expected = dict(naive.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in ours.named_parameters())


def test_lowrank_layers_lists_a_shared_layer_once():
    shared, other = linear(), convolution()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), other), "c": shared})
    assert list(lowrank_layers(model)) == [("a", shared), ("b.1", other)]


def test_representation_names_shape_rank_and_mode():
    assert repr(linear("tangent")) == (
        "LowRankLinear(in_features=5, out_features=7, rank=3, bias=True, gradient='tangent')"
    )
    assert repr(convolution(bias=False)) == (
        "LowRankConv2d(2, 7, kernel_size=(3, 3), stride=(2, 2), rank=4, bias=False, "
        "gradient='factors')"
    )


@pytest.mark.parametrize("rank", [0, -2, 6])
def test_linear_refuses_an_impossible_rank(rank):
    sentence = rf"LowRankLinear needs 1 <= rank <= min\(m, n\) = 5 for a 7x5 matrix, got {rank};"
    with pytest.raises(ValueError, match=sentence):
        LowRankLinear(5, 7, rank)
    with pytest.raises(ValueError, match=rf"= 5 for a 7x5 matrix, got {rank};"):
        LowRankLinear.from_weight(torch.zeros(7, 5), None, rank)


@pytest.mark.parametrize("rank", [0, 8])
def test_convolution_refuses_an_impossible_rank(rank):
    with pytest.raises(ValueError, match=rf"= 7 for a 7x18 matrix, got {rank}; choose"):
        LowRankConv2d(2, 7, 3, rank)


@each_layer
def test_refuses_an_unknown_gradient(make, draw):
    layer = make()
    with pytest.raises(ValueError, match="'factors' or 'tangent', got 'natural'; use one"):
        layer.gradient = "natural"
    assert layer.gradient == "factors"


@each_layer
@pytest.mark.parametrize("name", ["U", "V"])
@pytest.mark.parametrize("fault", [1.01, float("nan")])
def test_tangent_mode_refuses_frames_that_are_not_orthonormal(make, draw, name, fault):
    layer = make()
    with torch.no_grad():
        getattr(layer, name).mul_(fault)
    layer(draw(torch.float64))  # factors mode takes any
    with pytest.raises(ValueError, match=rf"orthonormal columns in {name} for tangent gradients"):
        layer.gradient = "tangent"
    assert layer.gradient == "factors"


@each_layer
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("name", ["U", "V"])
def test_tangent_mode_refuses_to_load_frames_that_are_not_orthonormal(make, draw, name, assign):
    model = nn.Sequential(nn.Identity(), make("tangent"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[f"1.{name}"] *= 1.01
    with pytest.raises(RuntimeError, match=rf"load_state_dict of 1\.? needs .* in {name} for"):
        model.load_state_dict(state, assign=assign)
    plain = nn.Sequential(nn.Identity(), make())
    plain.load_state_dict(state, assign=assign)


@each_layer
def test_load_of_a_bad_frame_leaves_the_layer_as_it_was(make, draw):
    layer = make("tangent")
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="orthonormal columns in V"):
        layer.load_state_dict({**before, "V": before["V"] * 2})
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
