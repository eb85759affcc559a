"""Which backend runs: the setting, what kernels cannot take, and the sentences for what cannot run at all."""

import subprocess
import sys

import pytest
import torch
from kernel_cases import DEVICE, layer, stacks
from torch.func import vmap

import lowrank_geo
from lowrank_geo import dispatch, lowrank_linear, reference
from lowrank_geo.dispatch import use_backend


@pytest.fixture
def kernels(monkeypatch):
    """The names of the operators that were called."""
    called = []
    load = dispatch._kernel
    monkeypatch.setattr(dispatch, "_kernel", lambda name: called.append(name) or load(name))
    return called


def test_auto_is_torch_on_a_cpu_and_triton_on_a_gpu():
    assert (
        lowrank_geo.backend("cpu").name == "torch" and "auto" in lowrank_geo.backend("cpu").reason
    )
    assert lowrank_geo.backend("cuda").name == "triton"


def test_the_setting_decides():
    with use_backend("torch"):
        assert lowrank_geo.backend("cuda") == ("torch", "LOWRANK_GEO_BACKEND=torch")
    with use_backend("triton"):
        assert lowrank_geo.backend(DEVICE).name == "triton"
        assert lowrank_geo.backend("meta").name == "torch"
    assert dispatch.requested() == "auto"


def test_an_unknown_setting_is_refused():
    with (
        pytest.raises(ValueError, match="auto, torch or triton, got 'cuda'; use one"),
        use_backend("cuda"),
    ):
        pass
    assert dispatch.requested() == "auto"


def run(setting, code):
    """The last line that a fresh interpreter prints with LOWRANK_GEO_BACKEND set."""
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {"LOWRANK_GEO_BACKEND": setting, "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return (result.stdout + result.stderr).strip().splitlines()[-1]


def test_the_environment_is_read():
    code = "import lowrank_geo; print(*lowrank_geo.backend('cpu'))"
    assert run("torch", code) == "torch LOWRANK_GEO_BACKEND=torch"
    assert run("triton", code).startswith("torch Triton needs a GPU, or TRITON_INTERPRET=1")
    layers = (
        "import torch, lowrank_geo; layer = lowrank_geo.LowRankLinear(3, 3, 1); layer.gradient = 'tangent'; "
        "layer(torch.zeros(1, 3)); print('ran')"
    )
    assert run("triton", layers) == "ran"
    assert "got 'gpu'; use one of them" in run("gpu", layers)


DRIVER = """
import torch, lowrank_geo
from lowrank_geo import dispatch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", {arch}, 32)
driver.set_active(Driver())
compiled = torch.compile(lambda x: x * len(lowrank_geo.backend("cuda").name), fullgraph=True, backend="eager")
print(int(compiled(torch.ones(()))), *lowrank_geo.backend("cuda"))
"""


def test_a_gpu_that_triton_does_not_know_runs_in_torch():
    assert run("auto", DRIVER.format(arch=90)).startswith("6 triton")
    old = run("triton", DRIVER.format(arch=75))
    assert old == "5 torch kernels need compute capability 8.0, got 7.5"
    if DEVICE == "cpu":
        none = run("auto", "import lowrank_geo; print(*lowrank_geo.backend('cuda'))")
        assert none.startswith("torch Triton finds no GPU that it knows")


def test_without_triton_auto_falls_back_and_triton_says_what_to_do(monkeypatch):
    for name in ("lowrank_geo.kernels.tiles", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    assert lowrank_geo.backend("cuda") == ("torch", "Triton is not installed")
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="got none installed; pip install triton"),
    ):
        lowrank_geo.backend("cuda")


def test_kernels_take_float32_stacks(kernels):
    given = stacks(2, 9, 7, 3)["transport"]
    with use_backend("triton"):
        dispatch.transport(*given)
    assert kernels == ["transport"]


OTHER = {
    "float64": lambda x: x.double(),
    "no stack": lambda x: x[0],
    "two stacks": lambda x: x[None],
    "nothing in it": lambda x: x[:0],
    "differentiated": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_other_tensors_run_in_torch(kernels, change):
    given = [change(x) for x in stacks(2, 9, 7, 3)["transport"]]
    with use_backend("triton"):
        found = dispatch.transport(*given)
    assert kernels == []
    wanted = reference.transport(*given)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_auto_never_runs_an_interpreter(kernels):
    if DEVICE == "cpu":
        dispatch.transport(*stacks(1, 9, 7, 3)["transport"])
        assert kernels == []


def test_stacks_that_no_grid_holds_run_in_torch(kernels, monkeypatch):
    monkeypatch.setattr(dispatch, "LARGEST_STACK", 2)
    with use_backend("triton"):
        dispatch.spectral(torch.ones(3, 4, 2, device=DEVICE))
        assert kernels == []
        dispatch.spectral(torch.ones(2, 4, 2, device=DEVICE))
    assert kernels == ["spectral"]


def test_ranks_above_1024_run_in_torch(kernels):
    r = 1025
    U, S, x = (
        torch.eye(r, device=DEVICE),
        torch.eye(r, device=DEVICE),
        torch.randn(2, r, device=DEVICE),
    )
    with use_backend("triton"):
        assert torch.allclose(lowrank_linear(x, U, S, U, gradient="tangent"), x, atol=1e-5)
        dispatch.spectral(torch.cat([U, U])[None])
    assert kernels == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_take_three_dtypes(kernels, dtype):
    x, U, S, V, bias = layer(6, 9, 7, 3, torch.float32)["lowrank_linear"]
    with use_backend("triton"):
        y = lowrank_linear(x.to(dtype), U, S, V, bias, gradient="tangent")
        assert kernels == ["lowrank_linear"] and y.dtype == dtype
        lowrank_linear(x, U, S, V, bias, gradient="factors")
        lowrank_linear(x.double(), *(z.double() for z in (U, S, V, bias)), gradient="tangent")
        lowrank_linear(x[:0], U, S, V, bias, gradient="tangent")
    assert kernels == ["lowrank_linear"]


def test_layers_run_in_torch_under_function_transforms(kernels):
    x, U, S, V, _ = layer(6, 9, 7, 3, torch.float32)["lowrank_linear"]
    with use_backend("triton"):
        y = vmap(lambda x: lowrank_linear(x, U, S, V, gradient="tangent"))(x)
    assert kernels == [] and torch.allclose(y, x @ V @ S.T @ U.T, atol=1e-5)


def test_factors_on_another_device_are_no_kernel_s():
    x, U, S, V, _ = layer(6, 9, 7, 3, torch.float32)["lowrank_linear"]
    with use_backend("triton"):
        assert dispatch.layer_kernel(x, U, S, V, None) is not None
        assert dispatch.layer_kernel(x, U.to("meta"), S, V, None) is None
