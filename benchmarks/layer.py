"""Forward and backward of one layer: dense, two factors, and ours, as speed-ups over nn.Linear beside the FLOP limit.

    python benchmarks/layer.py [--tokens 2048] [--repeats 30] [--default-allocator]

The limit is the ratio of multiply-adds (see `limit`) with the best folding (docs/mathematics.md). Times are medians of
repeats in random order in one process; ends with one JSON line. Freed memory is kept by the process, for every
contender, as torch's caching allocator does on a GPU and its tuning guide advises on a CPU; otherwise the C library
gives pages back and faults them in again. `--default-allocator` leaves that in. "products" are those of tangent mode by
themselves, without autograd and without a new buffer: no layer made of them can be faster.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from protocol import environment, table
from torch import Tensor, nn

from lowrank_geo import LowRankLinear

SHAPES = [(768, 768, 96), (1024, 1024, 128), (3072, 768, 128), (2048, 2048, 256)]  # m, n, r
COLUMNS = ("tangent", "factors", "two factors", "products")
KEPT_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def limit(B: int, m: int, n: int, r: int) -> float:
    """The best possible speed-up over nn.Linear, from multiply-adds alone.

    3Bmn dense against 3Br(m+n) + r²[min(B,m) + min(B,n) + min(B,m,n) + m + n].
    """
    small = r * r * (min(B, m) + min(B, n) + min(B, m, n) + m + n)
    return 3 * B * m * n / (3 * B * r * (m + n) + small)


def contenders(m: int, n: int, r: int) -> dict[str, nn.Module]:
    tangent = LowRankLinear(n, m, r, bias=False)
    tangent.gradient = "tangent"
    return {
        "dense": nn.Linear(n, m, bias=False),
        "tangent": tangent,
        "factors": LowRankLinear(n, m, r, bias=False),
        "two factors": nn.Sequential(nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False)),
    }


def bare_products(m: int, n: int, r: int, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """The products of tangent mode and nothing else, into buffers that are there: what this machine's BLAS allows."""
    B = len(x)
    U, S, V = torch.randn(m, r), torch.randn(r, r), torch.randn(n, r)
    a, b, M = torch.empty(B, r), torch.empty(B, r), torch.empty(r, r)
    US, VSt, GV, GtU = torch.empty(m, r), torch.empty(n, r), torch.empty(m, r), torch.empty(n, r)
    y, dx = torch.empty(B, m), torch.empty(B, n)

    @torch.no_grad()
    def run() -> None:
        torch.mm(x, V, out=a)
        torch.mm(a, torch.mm(U, S, out=US).mT, out=y)
        torch.mm(dy, U, out=b)
        torch.mm(b, torch.mm(V, S.mT, out=VSt).mT, out=dx)
        torch.mm(dy.mT, a, out=GV)
        torch.mm(x.mT, b, out=GtU)
        torch.mm(U.mT, GV, out=M)
        GV.addmm_(U, M, alpha=-1)
        GtU.addmm_(V, M.mT, alpha=-1)

    return run


def pass_through(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(dy)

    return run


def medians(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds a call, medians; the contenders take turns so that noise hits all alike, in random order
    because the one after nn.Linear pays for the pages that nn.Linear gave back.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for repeat in range(repeats + 2):
        for name in order.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def saved_floats(layer: nn.Module, x: Tensor) -> int:
    """Numbers kept for backward besides the parameters, each storage counted once."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def measure(m: int, n: int, r: int, tokens: int, repeats: int) -> dict[str, Any]:
    x = torch.randn(tokens, n, requires_grad=True)
    dy = torch.randn(tokens, m)
    layers = contenders(m, n, r)
    runs = {k: pass_through(v, x, dy) for k, v in layers.items()}
    seconds = medians({**runs, "products": bare_products(m, n, r, x, dy)}, repeats)
    best = limit(tokens, m, n, r)
    return {
        "shape": [m, n, r],
        "limit": best,
        "ms": {k: 1e3 * s for k, s in seconds.items()},
        "speedup": {k: seconds["dense"] / s for k, s in seconds.items()},
        "of_limit": {k: seconds["dense"] / s / best for k, s in seconds.items()},
        "saved_floats": {k: saved_floats(v, x) for k, v in layers.items()},
    }


def keep_pages() -> None:
    """Start this program again with a C library that keeps freed memory; it reads its settings at the start only."""
    if not KEPT_PAGES.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT_PAGES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--default-allocator", action="store_true", help="give pages back")
    arguments = parser.parse_args()
    if not arguments.default_allocator:
        keep_pages()
    results = [measure(*s, arguments.tokens, arguments.repeats) for s in SHAPES]
    rows = [
        [
            "×".join(map(str, r["shape"])),
            f"{r['ms']['dense']:.1f}",
            *(f"{r['speedup'][k]:.2f} ({r['of_limit'][k]:.2f})" for k in COLUMNS),
            f"{r['limit']:.2f}",
            f"{r['saved_floats']['tangent'] / 1e6:.2f} / {r['saved_floats']['dense'] / 1e6:.2f}",
        ]
        for r in results
    ]
    saved = "M floats kept, ours / dense"
    header = ["m×n×r", "dense ms", "tangent (of limit)", *COLUMNS[1:], "limit", saved]
    print(table(header, rows))
    means = {k: math.prod(r["of_limit"][k] for r in results) ** (1 / len(results)) for k in COLUMNS}
    print("geometric mean of the limit:", ", ".join(f"{k} {v:.2f}" for k, v in means.items()))
    kept = not arguments.default_allocator
    record = {"benchmark": "layer", "keeps_pages": kept, "of_limit": means, "rows": results}
    print(json.dumps({**record, **environment()}))


if __name__ == "__main__":
    main()
