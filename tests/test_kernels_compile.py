"""Kernels for a GPU that is not there: they compile, fit into it, and a compiler sees into the operators."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
THOROUGH = pytest.mark.thorough
HERE = Path(__file__).parent
SPILLED = 320  # bytes of registers that a thread may keep elsewhere
SHARED = 99 * 1024  # bytes of shared memory a program may have on compute capability 8.6 and later


def compiled(*command):
    """What a fresh interpreter with compiled kernels prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, *map(str, command)]
    result = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("cases", [["12x768x96x4096"], pytest.param([], marks=THOROUGH)], ids=len)
def test_every_kernel_compiles_for_a_gpu_and_fits(cases):
    """The usual sizes; thorough: the smallest, the largest, and those that are no multiples of a tile."""
    found = [json.loads(line) for line in compiled(HERE / "cross_compile.py", *cases)]
    launched = {record["kernel"] for record in found}
    sources = "".join(file.read_text("utf-8") for file in (HERE.parent / "kernels").glob("*.py"))
    assert launched == {name for name in launched if f"def {name}(" in sources} and len(found) >= 15
    for record in found:
        assert record["shared"] <= SHARED and record["spilled"] <= SPILLED, record
        assert record["narrow"] == 0, record
    # A filter alone multiplies nothing; everything else is on tensor cores, float32 by default too.
    assert {r["kernel"] for r in found if not r["products"]} == {"_tangent_kernel"}


TRACE = """
import collections, logging, torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
# Without a driver torch cannot analyse the kernels, says so at length, and assumes that they write everywhere.
logging.disable(logging.CRITICAL)
from lowrank_geo import binding as b
class Step(nn.Module):
    def forward(self, U, V, S, x, w):
        y, a = b.lowrank_linear(x, U[0], S[0], V[0])
        backward = b.lowrank_linear_backward(y, x, U[0], S[0], V[0], a, True)
        moved = *b.transport(U, V, U, S, V, U, V, S, S), *b.retract(U, S, U), *b.polar(U, U, U)
        directions = b.spectral(U), *b.damped_factor(U), b.apply(U, S, w[:, 0])
        return y, *backward, *moved, *directions, *b.tangent(U, None, None, S, U, w)
with FakeTensorMode():
    given = [torch.empty(*s) for s in ((3, 40, 5), (3, 30, 5), (3, 5, 5), (64, 30), (3, 4))]
graph, _ = aot_export_module(Step(), given, trace_joint=False)
print(collections.Counter(str(n.target) for n in graph.graph.nodes)["triton_kernel_wrapper_functional"])
"""


@pytest.mark.slow
def test_a_compiler_sees_the_kernels_inside_of_the_operators():
    # linear 1, backward 1 + 2 + 2 + 2, transport 4, retract 1 + 1 + 2 + 1 + 1, polar 2, spectral 2, factor 1,
    # apply 1, tangent 1
    assert compiled("-W", "ignore", "-c", TRACE) == ["25"]
