"""The torch.library operators: what torch's own checker, autograd and torch.compile make of them."""

import shutil

import pytest
import torch
from kernel_cases import DEVICE, error, layer, stacks
from torch import nn

from lowrank_geo import LowRankLinear, binding, lowrank_linear
from lowrank_geo.dispatch import use_backend
from lowrank_geo.optim import RiemannianMuon, param_groups

STACKED = ("tangent", "transport", "retract", "polar", "spectral", "damped_factor", "apply")


@pytest.mark.parametrize("shape", [(2, 9, 7, 3), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_stacks_pass_opcheck(name, shape):
    torch.library.opcheck(getattr(binding, name), stacks(*shape)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 9, 7, 3), (1, 1, 1, 1)], ids=str)
def test_the_layer_passes_opcheck_with_its_derivatives(shape, bias, dtype):
    given = layer(*shape, dtype)["lowrank_linear"]
    given = [x.requires_grad_() for x in given[: None if bias else -1]]
    torch.library.opcheck(binding.lowrank_linear, tuple(given))


@pytest.mark.parametrize("shape", [(6, 9, 7, 3), (1, 1, 1, 1)], ids=str)
def test_the_backward_passes_opcheck(shape):
    given = layer(*shape, torch.float32)["lowrank_linear_backward"]
    torch.library.opcheck(binding.lowrank_linear_backward, given)


def gradients(backend, given, c):
    given = [x.detach().clone().requires_grad_() for x in given]
    with use_backend(backend):
        y = lowrank_linear(*given, gradient="tangent")
        return y, torch.autograd.grad((c * y).sum(), given)


@pytest.mark.parametrize("tokens", [4, 40])
def test_autograd_gives_the_gradients_of_the_torch_backend(tokens):
    given = layer(tokens, 19, 17, 3, torch.float32)["lowrank_linear"]
    c = torch.randn(tokens, 19, device=DEVICE)
    y, found = gradients("triton", given, c)
    expected, wanted = gradients("torch", given, c)
    assert "lowrank_geo" in type(y.grad_fn).__name__ or "View" in type(y.grad_fn).__name__
    assert error(y, expected) < 1e-6
    assert all(
        error(a, b) < 5e-6 and a.stride() == b.stride() for a, b in zip(found, wanted, strict=True)
    )


def test_second_derivatives_are_refused_in_one_sentence():
    x, U, S, V, bias = layer(4, 19, 17, 3, torch.float32)["lowrank_linear"]
    x.requires_grad_()
    with use_backend("triton"):
        y = lowrank_linear(x, U, S, V, bias, gradient="tangent")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="needs gradient='factors' for second derivatives"):
            dx.sum().backward()


def model():
    torch.manual_seed(1)
    layers = LowRankLinear(12, 20, 4), nn.Tanh(), LowRankLinear(20, 9, 3, bias=False)
    return nn.Sequential(*layers).to(DEVICE)


def trained(backend, compiler, with_step):
    """Losses of three steps of a model, compiled without graph breaks, and the step with it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with use_backend(backend):
        net = model()
        optimizer = RiemannianMuon(param_groups(net), lr=0.05)
        run = torch.compile(net, fullgraph=True, backend=compiler) if compiler else net
        if with_step:
            optimizer.compile(backend=compiler)
        x, y = torch.randn(5, 6, 12, device=DEVICE), torch.randn(5, 6, 9, device=DEVICE)
        losses = []
        for _ in range(3):
            loss = (run(x) - y).square().mean()
            net.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


def test_a_model_and_a_step_compiled_without_graph_breaks_train_as_uncompiled_ones():
    wanted = trained("torch", None, False)
    assert trained("triton", "aot_eager", True) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inductor_trains_alike_on_both_backends(backend):
    wanted = trained("torch", None, False)
    assert trained(backend, "inductor", False) == pytest.approx(wanted, rel=1e-5)
