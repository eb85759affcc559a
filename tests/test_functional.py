"""functional.lowrank_linear: both meanings of the gradient against dense float64, and the tools that must see it."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from oracles import dense, tangent_projection
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vjp, vmap

from lowrank_geo.dispatch import use_backend
from lowrank_geo.functional import lowrank_linear
from lowrank_geo.geometry import Tangent, embed, norm

# tokens, m, n, r: both sides of the two foldings, r = 1, r = n, r = m, one token, none.
SHAPES = [(3, 7, 5, 1), (40, 24, 18, 8), (5, 33, 8, 8), (50, 6, 40, 6), (4, 5, 5, 5), (1, 9, 7, 3)]
CORES = [None, "singular", "zero"]
MODES = ["factors", "tangent"]


@pytest.fixture
def problem(point):
    """x (tokens, n), the factors as leaves, a bias, and a weight c (tokens, m) that makes c·y the loss."""

    def draw(tokens, m, n, r, dtype=torch.float64, **options):
        factors = [x.requires_grad_() for x in point(m, n, r, dtype, **options)]
        x, bias, c = (torch.randn(s, dtype=dtype) for s in [(tokens, n), (m,), (tokens, m)])
        return x.requires_grad_(), factors, bias.requires_grad_(), c

    return draw


def gradients(x, factors, bias, c, mode):
    y = lowrank_linear(x, *factors, bias, gradient=mode)
    return y, torch.autograd.grad((c * y).sum(), [x, *factors, bias])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("tokens, m, n, r", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_output_and_gradient_of_x_and_bias_are_those_of_the_dense_layer(
    problem, mode, tokens, m, n, r, core
):
    x, factors, bias, c = problem(tokens, m, n, r, core=core)
    y, found = gradients(x, factors, bias, c, mode)
    expected = F.linear(x, dense(tuple(factors)), bias)
    wanted = torch.autograd.grad((c * expected).sum(), [x, bias])
    assert (y - expected).norm() < 1e-13 * expected.norm()
    assert (found[0] - wanted[0]).norm() <= 1e-13 * wanted[0].norm()
    assert (found[-1] - wanted[1]).norm() < 1e-13 * wanted[1].norm()


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("tokens, m, n, r", SHAPES)
def test_tangent_gradient_is_the_projected_dense_gradient(problem, point, tokens, m, n, r, core):
    x, factors, bias, c = problem(tokens, m, n, r, core=core)
    p = type(point(1, 1, 1))(*(f.detach() for f in factors))
    _, (_, *found, _) = gradients(x, factors, bias, c, "tangent")
    G = c.T @ x.detach()
    xi = Tangent(*found)
    assert (embed(p, xi) - tangent_projection(p, G)).norm() < 1e-12 * G.norm()
    assert (norm(xi) - tangent_projection(p, G).norm()).abs() < 1e-12 * G.norm()
    assert max((p.U.mT @ xi.Up).abs().max(), (p.V.mT @ xi.Vp).abs().max()) < 1e-12 * G.norm()


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("tokens, m, n, r", SHAPES)
def test_factor_gradient_is_the_chain_rule_of_the_dense_gradient(problem, tokens, m, n, r, core):
    x, factors, bias, c = problem(tokens, m, n, r, core=core)
    _, (_, *found, _) = gradients(x, factors, bias, c, "factors")
    U, S, V = (f.detach() for f in factors)
    G = c.T @ x.detach()
    for got, wanted in zip(found, (G @ V @ S.mT, U.mT @ G @ V, G.mT @ U @ S), strict=True):
        assert (got - wanted).norm() < 1e-12 * G.norm()


def test_tangent_gradient_adds_up_over_micro_batches(problem):
    x, factors, bias, c = problem(40, 24, 18, 8)
    _, whole = gradients(x, factors, bias, c, "tangent")
    halves = [gradients(x[i::2], factors, bias, c[i::2], "tangent")[1] for i in (0, 1)]
    for a, b, total in zip(halves[0][1:], halves[1][1:], whole[1:], strict=True):
        assert (a + b - total).abs().max() < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (2, 3, 5), (1, 1, 1, 5)], ids=str)
def test_any_leading_shape_works(problem, mode, shape):
    _, factors, bias, _ = problem(1, 7, 5, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = lowrank_linear(x, *factors, bias, gradient=mode)
    assert y.shape == (*shape[:-1], 7)
    assert torch.allclose(y, F.linear(x, dense(tuple(factors)), bias), atol=1e-13)
    y.sum().backward()
    assert x.grad.shape == shape and all(f.grad.isfinite().all() for f in factors)
    assert x.numel() or not any(f.grad.any() for f in factors)


@pytest.mark.parametrize("mode", MODES)
def test_strides_of_x_do_not_matter(problem, mode):
    _, factors, bias, c = problem(6, 7, 5, 2)
    wide = torch.randn(5, 12, dtype=torch.float64)
    for x in (wide[:, ::2].T, wide[:, :6].T, torch.randn(1, 5, dtype=torch.float64).expand(6, 5)):
        strided = x.detach().requires_grad_()
        plain = x.detach().contiguous().requires_grad_()
        y, found = gradients(strided, factors, bias, c, mode)
        expected, wanted = gradients(plain, factors, bias, c, mode)
        assert (y - expected).abs().max() < 1e-13
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("tokens, m, n, r", [(3, 4, 5, 2), (9, 4, 5, 4)])
def test_factors_mode_passes_gradcheck_and_gradgradcheck(problem, tokens, m, n, r):
    x, factors, bias, _ = problem(tokens, m, n, r)
    inputs = (x, *factors, bias)
    assert torch.autograd.gradcheck(lowrank_linear, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lowrank_linear, inputs)


def test_factors_mode_passes_torch_func(problem):
    x, factors, bias, _ = problem(6, 4, 5, 2)
    inputs = tuple(z.detach() for z in (x, *factors, bias))
    directions = tuple(torch.randn_like(z) for z in inputs)

    def dense_layer(x, U, S, V, bias):
        return F.linear(x, U @ S @ V.mT, bias)

    def loss(layer):
        return lambda *inputs: layer(*inputs).pow(3).sum()

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    close(jvp(lowrank_linear, inputs, directions), jvp(dense_layer, inputs, directions))
    seed = torch.randn(6, 4, dtype=torch.float64)
    close(vjp(lowrank_linear, *inputs)[1](seed), vjp(dense_layer, *inputs)[1](seed))
    for position in range(5):
        curvature = [hessian(loss(f), position)(*inputs) for f in (lowrank_linear, dense_layer)]
        close(*curvature)
    per_sample = (0, None, None, None, None)
    ours = vmap(grad(loss(lowrank_linear), (1, 2, 3)), per_sample)(*inputs)
    close(ours, vmap(grad(loss(dense_layer), (1, 2, 3)), per_sample)(*inputs))
    ensemble = tuple(torch.stack([f, 2 * f]) for f in inputs)
    close(vmap(lowrank_linear)(*ensemble), vmap(dense_layer)(*ensemble))


def test_tangent_mode_refuses_second_derivatives(problem):
    x, factors, bias, c = problem(6, 7, 5, 2)
    y = lowrank_linear(x, *factors, bias, gradient="tangent").square().sum()
    first = torch.autograd.grad(y, [x, *factors], create_graph=True)
    for g in first:
        with pytest.raises(RuntimeError, match=r"needs gradient='factors' for second.*layer\.grad"):
            torch.autograd.grad(g.sum(), factors, retain_graph=True, allow_unused=True)


def test_tangent_mode_refuses_forward_derivatives(problem):
    # A derivative of zero would be silently wrong.
    x, factors, _, _ = problem(6, 7, 5, 2)
    plain = [f.detach() for f in factors]

    def layer(x, U, S, V):
        return lowrank_linear(x, U, S, V, gradient="tangent")

    inputs = (x.detach(), *plain)
    with pytest.raises(RuntimeError, match="gradient='factors'"):
        jvp(layer, inputs, tuple(torch.ones_like(z) for z in inputs))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="gradient='factors'"):
        layer(forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])), *plain)


def test_frozen_factors_and_inputs_get_no_gradient(problem):
    x, factors, bias, c = problem(6, 7, 5, 2)
    for mode in MODES:
        U, S, V = (f.detach().clone() for f in factors)
        S.requires_grad_()
        (c * lowrank_linear(x.detach(), U, S, V, gradient=mode)).sum().backward()
        G = c.T @ x.detach()
        assert (S.grad - U.mT @ G @ V).norm() < 1e-12 * G.norm()
        assert U.grad is None and V.grad is None


def test_tangent_mode_passes_first_order_torch_func(problem):
    x, factors, _, c = problem(6, 7, 5, 2)
    plain = [f.detach() for f in factors]

    def loss(x, U, S, V, c):
        return (c * lowrank_linear(x, U, S, V, gradient="tangent")).sum()

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    wanted = torch.autograd.grad(loss(x, *factors, c), [x, *factors])
    close(grad(loss, (0, 1, 2, 3))(x.detach(), *plain, c), wanted)
    per_sample = vmap(grad(loss, (1, 2, 3)), (0, None, None, None, 0))(x.detach(), *plain, c)
    for i in range(6):
        alone = torch.autograd.grad(loss(x[i], *factors, c[i]), factors)
        close(tuple(g[i] for g in per_sample), alone)


@pytest.mark.parametrize("tokens", [0, 3, 20])
@pytest.mark.parametrize("m, n", [(7, 5), (5, 7)])
def test_tangent_gradients_come_in_rows_like_the_parameters(problem, tokens, m, n):
    # Optimizers with foreach kernels and DDP buckets fall back to copies for other strides.
    x, factors, _, c = problem(tokens, m, n, 2)
    (c * lowrank_linear(x, *factors, gradient="tangent")).sum().backward()
    assert all(f.grad.stride() == f.stride() for f in factors)


def saved_for_backward(layer):
    """Data pointers and sizes of what autograd keeps."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer()
    return kept


@pytest.mark.parametrize("tokens", [3, 64])
def test_tangent_mode_keeps_x_and_xV_and_the_factors_only(problem, tokens):
    x, factors, bias, _ = problem(tokens, 24, 18, 4)
    kept = saved_for_backward(lambda: lowrank_linear(x, *factors, bias, gradient="tangent"))
    known = {z.data_ptr() for z in (x, *factors)}
    extra = [size for pointer, size in kept.items() if pointer not in known]
    assert known <= set(kept)
    assert extra == [tokens * 4]  # x V


def test_factors_mode_keeps_no_activation_but_x_and_xV(problem):
    x, factors, bias, _ = problem(64, 24, 18, 4)
    kept = saved_for_backward(lambda: lowrank_linear(x, *factors, bias))
    known = {z.data_ptr() for z in (x, *factors)}
    extra = sorted(size for pointer, size in kept.items() if pointer not in known)
    assert extra == sorted([64 * 4, 24 * 4])  # x V, and U S, the size of a factor


# 10 x the worst of 200 draws; one bfloat16 rounding is 4e-3.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens, m, n, r", SHAPES[:4])
def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32(
    problem, mode, tokens, m, n, r
):
    x, factors, bias, c = problem(tokens, m, n, r, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lowrank_linear(x, *factors, bias, gradient=mode)
    found = torch.autograd.grad(y, [x, *factors, bias], c.bfloat16())
    expected, wanted = gradients(x, factors, bias, c, mode)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in found)
    assert (y - expected).norm() < 0.05 * expected.norm()
    assert all((a - b).norm() < 0.1 * (1 + b.norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("tokens, m, n, r", SHAPES[:4])
def test_tangent_gradient_stays_in_the_gauge_under_autocast(problem, tokens, m, n, r):
    # Rounding of bfloat16, 4e-3, must not leak into the span of U: the bound is one of float32.
    x, (U, S, V), bias, c = problem(tokens, m, n, r, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lowrank_linear(x, U, S, V, bias, gradient="tangent")
    G = (c.T @ x).norm()
    for backward_inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            found = torch.autograd.grad(y, [U, S, V], c.bfloat16(), retain_graph=True)
        Up, _, Vp = found
        assert (U.mT @ Up).norm() < 1e-6 * G and (V.mT @ Vp).norm() < 1e-6 * G


@pytest.mark.parametrize("mode", MODES)
def test_autocast_leaves_double_inputs_alone_like_nn_linear(problem, mode):
    x, factors, bias, _ = problem(4, 7, 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = lowrank_linear(x, *factors, bias, gradient=mode)
        assert y.dtype == F.linear(x, dense(tuple(factors)), bias).dtype


COMPILED = ["aot_eager"] + (["inductor"] if shutil.which("g++") else [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_graph_breaks_to_the_same_gradients(problem, mode, backend):
    torch._dynamo.reset()
    compiled = torch.compile(lowrank_linear, fullgraph=True, backend=backend)
    x, factors, bias, c = problem(12, 7, 5, 2, torch.float32)
    strided = x.detach().T.contiguous().T.requires_grad_()
    for z in (x, strided):
        y = compiled(z, *factors, bias, gradient=mode)
        found = torch.autograd.grad((c * y).sum(), [z, *factors, bias])
        expected, wanted = gradients(z, factors, bias, c, mode)
        assert (y - expected).abs().max() < 1e-5
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(found, wanted, strict=True))


def test_refuses_x_of_another_width(problem):
    x, factors, bias, _ = problem(4, 7, 5, 2)
    with pytest.raises(ValueError, match=r"last dimension 5, got \(4, 3\); check the input"):
        lowrank_linear(x[:, :3], *factors, bias)


BAD = {
    "no dimension": (lambda x, U, S, V, b: (x[0, 0], U, S, V, b), r"last dimension 5, got \(\)"),
    "integers": (lambda x, U, S, V, b: (x.long(), U, S, V, b), r"floating point, got torch.int64"),
    "U of another rank": (lambda x, U, S, V, b: (x, U[:, :1], S, V, b), r"\[\(7, 1\), \(2, 2\)"),
    "S not square": (lambda x, U, S, V, b: (x, U, S[:1], V, b), r"got \[\(7, 2\), \(1, 2\)"),
    "V of another rank": (lambda x, U, S, V, b: (x, U, S, V[:, :1], b), r"\(5, 1\), \(7,\)"),
    "a bias of one": (lambda x, U, S, V, b: (x, U, S, V, b[:1]), r"\(1,\)\]; pass the factors of one"),
    "U elsewhere": (lambda x, U, S, V, b: (x, U.to("meta"), S, V, b), "got cpu and cpu, meta; move"),
    "x elsewhere": (lambda x, U, S, V, b: (x.to("meta"), U, S, V, b), "got meta and cpu; move one"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spoil, sentence", BAD.values(), ids=BAD)
def test_refuses_operands_that_do_not_fit_in_one_sentence(problem, spoil, sentence, mode, backend):
    x, factors, bias, _ = problem(4, 7, 5, 2, torch.float32)
    operands = spoil(x.detach(), *(z.detach() for z in factors), bias.detach())
    with use_backend(backend), pytest.raises((ValueError, TypeError), match=sentence) as refused:
        lowrank_linear(*operands, gradient=mode)
    assert str(refused.value).startswith("lowrank_linear needs")


@pytest.mark.parametrize("mode", MODES)
def test_has_shapes_alone_on_meta(problem, mode):
    x, factors, bias, _ = problem(4, 7, 5, 2, torch.float32)
    operands = [z.detach().to("meta").requires_grad_() for z in (x, *factors, bias)]
    y = lowrank_linear(*operands, gradient=mode)
    y.sum().backward()
    assert y.shape == (4, 7) and all(z.grad.shape == z.shape for z in operands)


def test_refuses_an_unknown_gradient(problem):
    x, factors, bias, _ = problem(4, 7, 5, 2)
    with pytest.raises(ValueError, match="'factors' or 'tangent', got 'natural'"):
        lowrank_linear(x, *factors, bias, gradient="natural")
