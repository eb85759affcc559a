"""Time, peak memory and gradient error of momentum stacks over depth, beside checkpointing and the known package.

python benchmarks/momentum_depth.py            # minutes; results/momentum_depth.jsonl

Contenders: backprop; backprop with activation checkpoints of every block and every √depth blocks; reversible in fixed
point and in float64; momentumnet, if it is installed. Times are those of forward and backward over that of backprop, in
turns in one process. Memory is the peak of live bytes (lowrank_geo.live_memory), beside the limit of the fixed point:
what the smallest depth needs, 8 bytes an entry every 44 lost bits, and the gradients of the further blocks' parameters,
which backward holds until it ends. Gradient errors are relative, against backprop on the same forward: of ours in the
same arithmetic, of momentumnet its own backprop mode.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from protocol import ROOT, Lines, environment, table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_geo.live_memory import peak_bytes
from lowrank_geo.models import MomentumStack

try:
    from momentumnet import MomentumNet
except ModuleNotFoundError:
    MomentumNet = None

METHODS = [
    "backprop",
    "checkpoints, every block",
    "checkpoints, every √depth",
    "reversible, fixed point",
    "reversible, float64",
    "momentumnet",
]


class Checkpointed(nn.Module):
    """A stack cut in segments of `length` blocks, of which only the first state is kept."""

    def __init__(self, blocks: list[nn.Module], gamma: float, length: int) -> None:
        super().__init__()
        cuts = range(0, len(blocks), length)
        self.segments = nn.ModuleList(MomentumStack(blocks[c : c + length], gamma) for c in cuts)

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for segment in self.segments:
            x, v = checkpoint(segment.flow, x, v, use_reentrant=False)
        return x


class InFloat32(nn.Module):
    """A block that computes in float32 for a state in float64, as in reversible mode."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.float()).double()


def blocks_of(depth: int, width: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]


def contender(method: str, blocks: list[nn.Module], gamma: float) -> nn.Module:
    if method == "momentumnet":
        return MomentumNet(blocks, gamma=gamma, use_backprop=False, is_residual=True)
    if "checkpoints" in method:
        length = 1 if "every block" in method else math.isqrt(len(blocks) - 1) + 1
        return Checkpointed(blocks, gamma, length)
    if method == "backprop":
        return MomentumStack(blocks, gamma)
    return MomentumStack(blocks, gamma, mode="reversible", exact="fixed" in method)


def wanted_gradient(method: str, blocks: list[nn.Module], gamma: float, x: Tensor) -> Tensor:
    """Of backprop on the same forward."""
    if method == "momentumnet":
        return gradient(MomentumNet(blocks, gamma=gamma, use_backprop=True, is_residual=True), x)
    if method == "reversible, float64":
        return gradient(MomentumStack(map(InFloat32, blocks), gamma), x.double())
    return gradient(MomentumStack(blocks, gamma, exact="fixed" in method), x)


def gradient(stack: nn.Module, x: Tensor) -> Tensor:
    loss = stack(x).square().mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(stack.parameters()))])


def gradient_error(method: str, gamma: float, depth: int, x: Tensor, width: int) -> float:
    blocks = blocks_of(depth, width)
    found = gradient(contender(method, blocks, gamma), x).double()
    wanted = wanted_gradient(method, blocks, gamma, x).double()
    return float((found - wanted).norm() / wanted.norm())


def passes(stack: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        stack(x).square().mean().backward()

    return run


def measure(gamma: float, depth: int, batch: int, width: int, repeats: int) -> dict[str, Any]:
    """Time ratio, peak bytes and gradient error of every contender at one depth."""
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(1))
    methods = [m for m in METHODS if m != "momentumnet" or MomentumNet is not None]
    runs = {m: passes(contender(m, blocks_of(depth, width), gamma), x) for m in methods}
    spent: dict[str, list[float]] = {m: [] for m in methods}
    refused = {}
    for method, run in list(runs.items()):
        try:
            run()  # gradients and buffers exist from now on
        except RuntimeError as refusal:
            refused[method] = str(refusal)
            del runs[method]
    for _ in range(repeats):
        for method, run in runs.items():
            begin = time.perf_counter()
            run()
            spent[method].append(time.perf_counter() - begin)
    base = statistics.median(spent["backprop"])
    return {
        "time": {m: statistics.median(spent[m]) / base for m in runs},
        "peak_bytes": {m: peak_bytes(run) for m, run in runs.items()},
        "gradient_error": {m: gradient_error(m, gamma, depth, x, width) for m in runs},
        "refused": refused,
    }


def lost_bytes(gamma: float, depth: int, entries: int) -> int:
    """What the bits that a step loses take: 8 bytes an entry every 44 of them."""
    return 8 * entries * math.ceil(depth * math.log2(1 / gamma) / 44)


def gradient_bytes(depth: int, width: int) -> int:
    """The gradients of the parameters of all blocks, in float32."""
    return 4 * depth * width * (width + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.5, 0.9, 0.99])
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 40, 100, 400, 1000])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    lines, rows = Lines(ROOT / "results" / "momentum_depth.jsonl"), []
    sizes = {"batch": given.batch, "width": given.width, "repeats": given.repeats}
    for gamma in given.gammas:
        constant = None
        for depth in sorted(given.depths):
            record = lines.get(
                {"benchmark": "momentum_depth", "gamma": gamma, "depth": depth, **sizes},
                lambda gamma=gamma, depth=depth: measure(gamma, depth, *sizes.values()),
            )
            peaks = record["peak_bytes"]
            grown = gradient_bytes(depth, given.width)
            constant = constant or peaks["reversible, fixed point"] - grown
            limit = constant + grown + lost_bytes(gamma, depth, given.batch * given.width)
            for method, peak in peaks.items():
                rows.append(
                    [
                        f"{gamma:g}",
                        str(depth),
                        method,
                        f"{record['time'][method]:.2f}",
                        f"{peak / 2**20:.2f}",
                        f"{limit / 2**20:.2f}" if "fixed" in method else "",
                        f"{record['gradient_error'][method]:.1e}",
                    ]
                )
            rows += [
                [f"{gamma:g}", str(depth), method, "refused", "", "", ""]
                for method in record.get("refused", ())
            ]
    header = ["γ", "depth", "method", "time", "peak MiB", "limit MiB", "gradient error"]
    print(table(header, rows))
    print(json.dumps({"benchmark": "momentum_depth", **sizes, **environment()}))


if __name__ == "__main__":
    main()
