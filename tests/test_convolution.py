"""convolution.lowrank_conv2d: both meanings of the gradient against a dense float64 convolution."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from oracles import tangent_projection
from torch import nn
from torch.func import hessian, jvp, vjp

from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.convolution import ConvGeometry, lowrank_conv2d
from lowrank_geo.geometry import Point, Tangent, embed, norm

MODES = ["factors", "tangent"]
# Arguments of nn.Conv2d beside the channels, and the rank; the kernel is a 6 × 4·kh·kw matrix.
CONVOLUTIONS = [
    (dict(kernel_size=3, padding=1), 3),
    (dict(kernel_size=1), 4),
    (dict(kernel_size=(3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2)), 6),
    (dict(kernel_size=3, padding="same", padding_mode="circular"), 1),
    (dict(kernel_size=3, padding=2, padding_mode="reflect", stride=2), 2),
    (dict(kernel_size=(2, 3), padding="same", dilation=2, padding_mode="replicate"), 3),
    (dict(kernel_size=3, padding="valid", bias=False), 5),
]
IDS = [" ".join(map(str, c.values())) for c, _ in CONVOLUTIONS]
convolutions = pytest.mark.parametrize("options, rank", CONVOLUTIONS, ids=IDS)


def layer_and_twin(options, rank, dtype=torch.float64):
    """A low-rank layer, the dense convolution with the same kernel, and an image as leaf."""
    dense = nn.Conv2d(4, 6, dtype=dtype, **options)
    layer = LowRankConv2d.from_convolution(dense, rank)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    return layer, dense, torch.randn(2, 4, 7, 8, dtype=dtype, requires_grad=True)


def gradients(layer, x, seed):
    y = layer(x)
    wanted = [x, *layer.parameters()]
    return y, torch.autograd.grad(y, wanted, seed)


@convolutions
@pytest.mark.parametrize("mode", MODES)
def test_output_and_gradient_of_x_and_bias_are_those_of_the_dense_layer(options, rank, mode):
    layer, dense, x = layer_and_twin(options, rank)
    layer.gradient = mode
    expected = dense(x)
    seed = torch.randn_like(expected)
    y, (dx, *rest) = gradients(layer, x, seed)
    _, (wanted, *others) = gradients(dense, x, seed)
    assert (y - expected).norm() < 1e-13 * expected.norm()
    assert (dx - wanted).norm() < 1e-13 * wanted.norm()
    if dense.bias is not None:
        assert (rest[-1] - others[-1]).norm() < 1e-13 * others[-1].norm()


@convolutions
@pytest.mark.parametrize("core", [None, "singular", "zero"])
def test_both_gradients_are_those_of_the_dense_kernel(point, options, rank, core):
    layer, dense, x = layer_and_twin(options, rank)
    p = point(6, dense.weight[0].numel(), rank, core=core)
    with torch.no_grad():
        for parameter, value in zip(layer.point, p, strict=True):
            parameter.copy_(value)
        dense.weight.copy_(layer.weight)
    seed = torch.randn_like(dense(x))
    G = torch.autograd.grad(dense(x), dense.weight, seed)[0].flatten(1)
    factors = torch.autograd.grad(layer(x), list(layer.point), seed)
    U, S, V = p
    for got, wanted in zip(factors, (G @ V @ S.mT, U.mT @ G @ V, G.mT @ U @ S), strict=True):
        assert (got - wanted).norm() < 1e-12 * G.norm()
    layer.gradient = "tangent"
    xi = Tangent(*torch.autograd.grad(layer(x), list(layer.point), seed))
    assert (embed(p, xi) - tangent_projection(p, G)).norm() < 1e-12 * G.norm()
    assert (norm(xi) - tangent_projection(p, G).norm()).abs() < 1e-12 * G.norm()
    assert max((U.mT @ xi.Up).abs().max(), (V.mT @ xi.Vp).abs().max()) < 1e-12 * G.norm()


def functional(options, rank):
    """lowrank_conv2d as a function of tensors alone, with inputs."""
    layer, dense, x = layer_and_twin(options, rank)
    geometry = ConvGeometry.of(dense)

    def convolve(x, U, S, V):
        return lowrank_conv2d(x, U, S, V, None, geometry)

    def convolve_dense(x, U, S, V):
        kernel = (U @ S @ V.mT).reshape(dense.weight.shape)
        padded = F.pad(x, geometry.padding, geometry.padding_mode)
        return F.conv2d(padded, kernel, None, geometry.stride, 0, geometry.dilation)

    inputs = (x.detach()[..., :4, :4], *(f.detach() for f in layer.point))
    return convolve, convolve_dense, inputs


@pytest.mark.parametrize("options, rank", CONVOLUTIONS[:2], ids=IDS[:2])
def test_factors_mode_passes_gradcheck_and_gradgradcheck(options, rank):
    convolve, _, inputs = functional(options, rank)
    inputs = tuple(z.clone().requires_grad_() for z in inputs)
    assert torch.autograd.gradcheck(convolve, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(convolve, inputs, fast_mode=True)


def test_factors_mode_passes_torch_func():
    convolve, convolve_dense, inputs = functional(*CONVOLUTIONS[0])
    directions = tuple(torch.randn_like(z) for z in inputs)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    close(jvp(convolve, inputs, directions), jvp(convolve_dense, inputs, directions))
    seed = torch.randn_like(convolve(*inputs))
    close(vjp(convolve, *inputs)[1](seed), vjp(convolve_dense, *inputs)[1](seed))

    def curvature(function):
        return hessian(lambda *z: function(*z).pow(3).sum(), (1, 2))(*inputs)

    close(curvature(convolve), curvature(convolve_dense))


def test_tangent_mode_refuses_second_derivatives():
    layer, _, x = layer_and_twin(*CONVOLUTIONS[0])
    layer.gradient = "tangent"
    first = torch.autograd.grad(layer(x).square().sum(), [x, layer.S], create_graph=True)
    for g in first:
        with pytest.raises(RuntimeError, match="needs gradient='factors' for second derivatives"):
            torch.autograd.grad(g.sum(), [layer.U], retain_graph=True)


def test_tangent_mode_refuses_forward_derivatives():
    layer, _, x = layer_and_twin(*CONVOLUTIONS[0])
    layer.gradient = "tangent"
    with pytest.raises(RuntimeError, match="gradient='factors'"):
        jvp(layer, (x.detach(),), (torch.ones_like(x),))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options, rank", CONVOLUTIONS[:2], ids=IDS[:2])
def test_keeps_channels_last_and_agrees_with_the_other_layout(options, rank, mode):
    layer, _, x = layer_and_twin(options, rank)
    layer.gradient = mode
    other = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    seed = torch.randn_like(layer(x))
    y, found = gradients(layer, other, seed)
    expected, wanted = gradients(layer, x, seed)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - expected).abs().max() < 1e-13
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, wanted, strict=True))


def test_tangent_mode_passes_first_order_torch_func():
    layer, dense, x = layer_and_twin(*CONVOLUTIONS[0])
    geometry, seed = ConvGeometry.of(dense), torch.randn_like(dense(x))

    def loss(x, seed, U, S, V):
        return (seed * lowrank_conv2d(x, U, S, V, None, geometry, gradient="tangent")).sum()

    plain = [f.detach() for f in layer.point]
    found = torch.func.grad(loss, (2, 3, 4))(x.detach(), seed, *plain)
    wanted = torch.autograd.grad(loss(x, seed, *layer.point), list(layer.point))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_takes_one_image_no_image_and_a_strided_one(mode):
    layer, dense, x = layer_and_twin(*CONVOLUTIONS[0])
    layer.gradient = mode
    assert (layer(x[0]) - dense(x)[0]).abs().max() < 1e-13
    strided = torch.randn(2, 4, 14, 16, dtype=torch.float64)[..., ::2, ::2]
    assert (layer(strided) - dense(strided)).abs().max() < 1e-13
    y = layer(x[:0])
    assert y.shape == (0, 6, 7, 8)
    y.sum().backward()
    assert not any(f.grad.any() for f in layer.point)


def test_tangent_mode_keeps_x_and_xV_and_the_factors_only():
    layer, _, x = layer_and_twin(dict(kernel_size=3), 3)
    layer.gradient = "tangent"
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    known = {z.data_ptr() for z in (x, *layer.point)}
    assert known <= set(kept)
    assert [n for pointer, n in kept.items() if pointer not in known] == [2 * 3 * 5 * 6]


@pytest.mark.parametrize("mode", MODES)
def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32(mode):
    layer, dense, x = layer_and_twin(dict(kernel_size=3, padding=1), 3, torch.float32)
    layer.gradient = mode
    expected = dense(x)
    seed = torch.randn_like(expected).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.point, layer.bias], seed)
    _, wanted = gradients(layer, x, seed.float())
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in found)
    assert (y - expected).norm() < 0.1 * expected.norm()
    names = dict(layer.named_parameters())
    order = [0, *(1 + list(names).index(k) for k in ("U", "S", "V", "bias"))]
    for a, b in zip(found, [wanted[i] for i in order], strict=True):
        assert (a - b).norm() < 0.1 * b.norm()
    if mode == "tangent":
        U, S, V = (f.detach() for f in layer.point)
        Up, M, Vp = found[1:4]
        size = M.norm() + Up.norm() + Vp.norm()
        assert (U.mT @ Up).norm() < 1e-5 * size and (V.mT @ Vp).norm() < 1e-5 * size


INDUCTOR = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
COMPILED = [
    ("factors", "aot_eager"),
    pytest.param("tangent", "inductor", marks=INDUCTOR),
    pytest.param("tangent", "aot_eager", marks=pytest.mark.thorough),
    pytest.param("factors", "inductor", marks=[INDUCTOR, pytest.mark.thorough]),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("mode, backend", COMPILED)
def test_compiles_without_graph_breaks_to_the_same_gradients(mode, backend):
    torch._dynamo.reset()
    layer, _, x = layer_and_twin(dict(kernel_size=3, padding=1), 3, torch.float32)
    layer.gradient = mode
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for z in (x, x.detach().to(memory_format=torch.channels_last).requires_grad_()):
        seed = torch.randn(2, 6, 7, 8)
        expected, wanted = gradients(layer, z, seed)
        y = compiled(z)
        found = torch.autograd.grad(y, [z, *layer.parameters()], seed)
        assert (y - expected).abs().max() < 1e-5
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(found, wanted, strict=True))


def test_refuses_a_grouped_convolution():
    with pytest.raises(ValueError, match="needs groups=1, got 2; keep grouped"):
        LowRankConv2d(4, 6, 3, 2, groups=2)
    with pytest.raises(ValueError, match="needs groups=1, got 4; keep grouped"):
        LowRankConv2d.from_convolution(nn.Conv2d(4, 8, 3, groups=4), 2)


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (7, 8), (1, 2, 4, 7, 8)], ids=str)
def test_refuses_an_image_of_another_shape(shape):
    layer, _, _ = layer_and_twin(*CONVOLUTIONS[0])
    with pytest.raises(ValueError, match=r"shape \(B, 4, H, W\), got .*; check the input"):
        layer(torch.zeros(shape, dtype=torch.float64))


def test_refuses_an_unknown_gradient():
    layer, dense, x = layer_and_twin(*CONVOLUTIONS[0])
    p = Point(*layer.point)
    with pytest.raises(ValueError, match="'factors' or 'tangent', got 'natural'"):
        lowrank_conv2d(x, *p, None, ConvGeometry.of(dense), gradient="natural")
