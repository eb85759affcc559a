"""Compile every kernel for a GPU that is not there, with the arguments of its own launchers, and print what it needs.

    python tests/cross_compile.py 12x768x96x4096    # the cases, all of CASES and of MODES if none is named

One JSON line a kernel: name, case, registers, spilled bytes, shared memory, tensor-core products, products of 32-bit
numbers with a count of programs, which addresses of large stacks overflow. Run without TRITON_INTERPRET. Tensors live
on the CPU; launches are replaced by compilations.
"""

import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

NAMES = ("gram", "lowrank_linear", "tangent", "transport", "polar", "retract", "spectral")
KINDS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


seen: dict[str, str] = {}  # what was compiled -> its case; the same again is not reported
case = ""


class Compiled:
    """Stands for a kernel: launching compiles it for compute capability 9.0."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        values = {**dict(zip(self.kernel.arg_names, args, strict=False)), **options}
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constants, hints = {}, {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            value = values[name]
            if name in fixed or (not isinstance(value, Tensor) and value == 1):
                signature[name], constants[(index,)] = "constexpr", value
            else:
                signature[name] = KINDS[value.dtype] if isinstance(value, Tensor) else "i32"
                if isinstance(value, Tensor) or value % 16 == 0:
                    hints[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, hints)
        chosen = {k: values[k] for k in ("num_warps", "num_stages") if k in values}
        what = repr((self.kernel.__module__, self.kernel.__name__, signature, constants, hints))
        if seen.setdefault(what, case) != case:
            return
        report(
            self.kernel.__name__,
            compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=chosen),
        )


def report(name: str, compiled: Any) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    record = {
        "kernel": name,
        "case": case,
        "registers": registers,
        "spilled": stack,
        "shared": compiled.metadata.shared,
        "products": len(re.findall(r"wgmma\.mma|mma\.sync", compiled.asm["ptx"])),
        "narrow": narrow(compiled.asm["ttir"]),
    }
    print(json.dumps(record), flush=True)


def narrow(ttir: str) -> int:
    """How many products of i32 have a factor that is a count of programs: it grows with the stack."""
    counts = re.findall(r"(%\w+) = tt\.get_num_programs", ttir)
    return sum(len(re.findall(rf"arith\.muli [^:]*{count}\b[^:]*: i32", ttir)) for count in counts)


# L, m, r, tokens: usual; every size one; sizes that are no multiples; the edge of what is fused; the largest rank
CASES = [
    (12, 768, 96, 4096),
    (1, 1, 1, 1),
    (2, 130, 33, 65),
    (2, 300, 128, 300),
    (2, 2048, 1024, 4096),
]
USUAL = [
    (torch.bfloat16, True),
    (torch.float32, False),
]  # activations, and whether they may be rounded
MODES = list(itertools.product((torch.bfloat16, torch.float16, torch.float32), (True, False)))


def main() -> None:
    global case
    for sizes in CASES:
        case = "x".join(map(str, sizes))
        if case in (sys.argv[1:] or [case]):
            compile_all(*sizes, USUAL if sys.argv[1:] else MODES)


def compile_all(L: int, m: int, r: int, tokens: int, modes: list[tuple[torch.dtype, bool]]) -> None:
    """Every kernel with every combination of optional arguments that the package launches."""
    modules = {name: importlib.import_module(f"lowrank_geo.kernels.{name}") for name in NAMES}
    for module in modules.values():
        module.wrap_triton = Compiled  # type: ignore[attr-defined]
        module.precision = lambda A: "tf32x3"  # type: ignore[attr-defined]
    tall, core, flags = (
        torch.empty(L, m, r),
        torch.empty(L, r, r),
        torch.empty(L, dtype=torch.int32),
    )
    d, wide = torch.empty(L), core.double()
    run = modules
    run["gram"].gram(tall, tall, d)
    run["tangent"].tangent(tall, tall, core)
    weights = torch.empty(L, 4)
    run["gram"].gram(tall, tall)
    run["tangent"].tangent(tall, R=core, momentum=tall, weights=weights)
    run["tangent"].tangent(tall, momentum=tall, weights=weights)
    run["transport"].transport_write(tall, tall, tall, core, core, core)
    run["polar"].polar_grams(tall, tall, tall, d)
    run["polar"].polar_grams(tall, tall, None, d)
    run["polar"].polar_write(tall, tall, tall, d, core, core, core, flags)
    run["polar"].polar_write(tall, tall, None, d, core, core, None, flags)
    run["retract"].stretch(tall, core, tall, core)
    run["retract"].stretch(tall, core, tall, None)
    run["retract"].regram(tall, None)
    run["retract"].regram(tall, wide)
    run["retract"].settle(tall, wide, tall, flags)
    run["retract"].products(tall, tall, tall)
    run["spectral"].apply(tall, core, d)
    for dtype, fast in modes:
        x, y = torch.empty(tokens, m, dtype=dtype), torch.empty(tokens, r, dtype=dtype)
        run["gram"].gram(x, y, fast=fast)
        run["lowrank_linear"].lowrank_linear(x, tall[0], None, tall[0], x[0], fast=fast)
        run["lowrank_linear"].lowrank_linear(x, tall[0], core[0], tall[0], fast=fast)
        run["lowrank_linear"].product(x, tall[0], fast=fast)


if __name__ == "__main__":
    main()
