"""The optimizer's step beside forward and backward: ours, Riemannian peers and torch's own, on 12 blocks of width 768.

    python benchmarks/step.py [--layers 12] [--rank 96] [--tokens 2048] [--repeats 7] [--growth]

Every contender holds the gradients of one backward pass of its own model and takes its steps in turns with the others,
in random order in one process, so that a noisy machine hits all alike: read ratios. `--growth` adds how the cost of a
step grows with rank and depth, and that of forward and backward with tokens, beside what operation counts predict. Ends
with one JSON line.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import geoopt
import language_model as lm
import torch
import torch.nn.functional as F
from language_model import Task
from layer import keep_pages, medians
from peft import LoraConfig, inject_adapter_in_model
from peft.optimizers import create_riemannian_optimizer
from protocol import environment, table
from torch import nn
from torch.optim import Optimizer

from lowrank_geo import lowrank_layers
from lowrank_geo.optim import LoRAPreconditioned, RiemannianAdam, scaled_lora

HEADER = ["method", "M parameters", "step, ms", "forward+backward, ms", "step/(f+b)", "/dense Muon"]
CONTEXT = 256


class Contender(NamedTuple):
    """A model and the optimizers that move it."""

    model: nn.Module
    optimizers: list[Optimizer]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


Build = Callable[[Task, int], Contender]


def riemannian(task: Task, rank: int, *, build: Callable[..., Any], **settings: Any) -> Contender:
    model = lm.lowrank(task, 0, rank)
    return Contender(model, build(model, 1e-4, **settings))


def factors(task: Task, rank: int, *, build: Callable[..., Any]) -> Contender:
    model = lm.factors(task, 0, rank)
    return Contender(model, build(model, 1e-4))


def dense(task: Task, rank: int, *, build: Callable[..., Any]) -> Contender:
    model = lm.dense(task, 0)
    return Contender(model, build(model, 1e-4))


def geoopt_stiefel(task: Task, rank: int) -> Contender:
    """geoopt's RiemannianAdam, U and V on its Stiefel manifolds and S free."""
    model = lm.lowrank(task, 0, rank)
    for _, layer in lowrank_layers(model):
        for name in "UV":
            factor = geoopt.ManifoldParameter(getattr(layer, name).data, geoopt.Stiefel())
            setattr(layer, name, factor)
    return Contender(model, [geoopt.optim.RiemannianAdam(model.parameters(), lr=1e-4)])


def lora(task: Task, rank: int, *, build: Callable[..., Optimizer]) -> Contender:
    """LoRA: factors of the same shapes, as adapters beside the frozen dense blocks."""
    names = ["q", "k", "v", "o", "gate", "up", "down"]
    config = LoraConfig(r=rank, target_modules=names, init_lora_weights=False)
    model = inject_adapter_in_model(config, lm.dense(task, 0))
    return Contender(model, [build(model, lr=1e-4)])


CONTENDERS: dict[str, Build] = {
    "RiemannianMuon": partial(riemannian, build=lm.riemannian_muon),
    "RiemannianMuon, product metric": partial(
        riemannian, build=lm.riemannian_muon, metric="product"
    ),
    "RiemannianAdam": partial(riemannian, build=lm.riemannian_adam),
    "RiemannianAdam, product metric": partial(
        riemannian, build=lm.riemannian_adam, metric="product"
    ),
    "geoopt RiemannianAdam on Stiefel": geoopt_stiefel,
    "PEFT create_riemannian_optimizer": partial(
        lora, build=partial(create_riemannian_optimizer, optimizer_cls=torch.optim.AdamW)
    ),
    "PEFT create_riemannian_optimizer, fused": partial(
        lora,
        build=partial(create_riemannian_optimizer, optimizer_cls=torch.optim.AdamW, fused=True),
    ),
    "LoRA, scaled_lora": partial(lora, build=scaled_lora),
    "LoRA, LoRAPreconditioned with RiemannianAdam": partial(
        lora, build=partial(LoRAPreconditioned, optimizer_cls=RiemannianAdam)
    ),
    "LoRA, LoRAPreconditioned with RiemannianMuon": partial(lora, build=LoRAPreconditioned),
    "two factors, AdamW": partial(factors, build=lm.adamw),
    "two factors, Muon": partial(factors, build=lm.muon),
    "dense, AdamW": partial(dense, build=lm.adamw),
    "dense, Muon": partial(dense, build=lm.muon),
}


def backward(model: nn.Module, tokens: int) -> None:
    """One forward and backward pass over sequences of CONTEXT tokens."""
    model.zero_grad(set_to_none=True)
    x = torch.randint(257, (max(1, tokens // CONTEXT), CONTEXT))
    F.cross_entropy(model(x).flatten(0, -2), x.flatten()).backward()


def seconds(contenders: dict[str, Contender], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Medians of a step and of forward and backward for each contender."""
    passes = medians(
        {k: partial(backward, c.model, tokens) for k, c in contenders.items()}, max(1, repeats // 2)
    )
    steps = medians({k: c.step for k, c in contenders.items()}, repeats)
    return {k: [steps[k], passes[k]] for k in contenders}


def compare(
    task: Task, rank: int, tokens: int, repeats: int, only: str = ""
) -> list[dict[str, Any]]:
    chosen = {name: build for name, build in CONTENDERS.items() if re.search(only, name)}
    contenders = {name: build(task, rank) for name, build in chosen.items()}
    found = seconds(contenders, tokens, repeats)
    muon = found.get("dense, Muon", [math.nan])[0]
    return [
        {
            "method": name,
            "parameters": sum(p.numel() for p in c.model.parameters() if p.requires_grad),
            "step_ms": 1e3 * found[name][0],
            "pass_ms": 1e3 * found[name][1],
            "of_pass": found[name][0] / found[name][1],
            "of_dense_muon": found[name][0] / muon,
        }
        for name, c in contenders.items()
    ]


def slope(xs: list[int], ys: list[float]) -> float:
    """The exponent p of y ∝ xᵖ, by least squares in the logarithms."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def operations(task: Task, rank: int) -> float:
    """Multiply-adds of the tall products of a step, up to a constant: Σ (m + n) r² + O(r³)."""
    d, h = task.width, task.hidden
    shapes = [(d, d)] * 4 + [(h, d)] * 2 + [(d, h)]
    return task.layers * sum((m + n) * rank**2 + 2 * rank**3 for m, n in shapes)


def growth(task: Task, rank: int, repeats: int) -> list[dict[str, Any]]:
    """How the cost of a step of RiemannianMuon and of a pass grow: fitted exponents beside those of the operations."""
    small = task._replace(layers=2)
    sizes: dict[str, list[int]] = {
        "step over rank": [24, 48, 96, 192],
        "step over depth": [1, 2, 4, 8],
        "pass over tokens": [512, 1024, 2048, 4096],
    }
    build = CONTENDERS["RiemannianMuon"]
    by_rank = {r: build(small, r) for r in sizes["step over rank"]}
    by_depth = {L: build(task._replace(layers=L), rank) for L in sizes["step over depth"]}
    for contender in (*by_rank.values(), *by_depth.values()):
        backward(contender.model, CONTEXT)
    model = by_rank[rank].model
    calls = {
        "step over rank": {r: c.step for r, c in by_rank.items()},
        "step over depth": {L: c.step for L, c in by_depth.items()},
        "pass over tokens": {T: partial(backward, model, T) for T in sizes["pass over tokens"]},
    }
    predicted = {
        "step over rank": [operations(small, r) for r in sizes["step over rank"]],
        "step over depth": [operations(task._replace(layers=L), rank) for L in by_depth],
        "pass over tokens": [float(T) for T in sizes["pass over tokens"]],
    }
    found = []
    for name, xs in sizes.items():
        times = medians({str(x): call for x, call in calls[name].items()}, repeats)
        ms = [1e3 * times[str(x)] for x in xs]
        fitted, expected = slope(xs, ms), slope(xs, predicted[name])
        found.append({"what": name, "at": xs, "ms": ms, "fitted": fitted, "predicted": expected})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--only", default="", help="methods that match this regular expression")
    arguments = parser.parse_args()
    keep_pages()
    task = Task(768, 2048, arguments.layers, 12, CONTEXT, 8, 0)
    rows = compare(task, arguments.rank, arguments.tokens, arguments.repeats, arguments.only)
    cells = [
        [
            r["method"],
            f"{r['parameters'] / 1e6:.1f}",
            f"{r['step_ms']:.0f}",
            f"{r['pass_ms']:.0f}",
            f"{r['of_pass']:.2f}",
            f"{r['of_dense_muon']:.2f}",
        ]
        for r in rows
    ]
    print(table(HEADER, cells))
    grown = growth(task, arguments.rank, arguments.repeats) if arguments.growth else []
    if grown:
        lines = [
            [
                g["what"],
                ", ".join(map(str, g["at"])),
                ", ".join(f"{x:.0f}" for x in g["ms"]),
                f"{g['fitted']:.2f}",
                f"{g['predicted']:.2f}",
            ]
            for g in grown
        ]
        print(table(["what", "at", "ms", "exponent", "of the operations"], lines))
    size = {"layers": arguments.layers, "rank": arguments.rank, "tokens": arguments.tokens}
    record = {"benchmark": "step", **size, "rows": rows, "growth": grown}
    print(json.dumps({**record, **environment()}))


if __name__ == "__main__":
    main()
