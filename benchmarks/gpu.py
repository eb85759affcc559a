"""Everything that only a GPU can tell, in one command and under 8 minutes.

    python benchmarks/gpu.py [--out benchmarks/results/gpu.jsonl]

Every part is a line of that file as soon as it ends; started again on the same device and commit, the script goes on
with the parts that are missing.

First the kernels against float64; nothing is timed if they are wrong. Then, as ratios within this run: kernels against
the measured bandwidth of a copy, layers against cuBLAS and torch.compile, the optimizer step against the training step
of `130m`, training of `350m` at half of the parameters against the dense model, launches over depth, a captured step,
and how costs grow. A part that no longer fits into the time is left out and said to be, a part that fails says why and
the others go on. Ends with one JSON line.
"""

import argparse
import itertools
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from protocol import Lines, environment, table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lowrank_geo
from lowrank_geo import LowRankLinear, convert, dispatch, geometry, reference, to_factors
from lowrank_geo.models.presets import decoder
from lowrank_geo.optim import RiemannianAdam, RiemannianMuon, param_groups

MINUTES = 8
BOUND = 2e-5  # of every operation in float32, relative to its largest output
LAYER_BOUNDS = {torch.float32: BOUND, torch.bfloat16: 3e-2}  # a rounding of bfloat16 is 2⁻⁹
ITEM = 4  # bytes of a float32
Run = Callable[[], Any]


class Sizes(NamedTuple):
    """How large everything is; tests take smaller ones."""

    matrices: int = 168  # in a stack: larger than any cache
    rows: int = 768
    ranks: tuple[int, ...] = (16, 96, 256)
    checked: tuple[int, ...] = (1000, 1024)  # ranks that are not timed
    tokens: int = 32768
    context: int = 256
    layers: tuple[tuple[int, int, int], ...] = ((768, 768, 96), (2048, 768, 96), (1024, 1024, 256))
    step_model: str = "130m"
    train_model: str = "350m"
    budget: float = 0.5
    depths: tuple[int, ...] = (2, 4, 8)
    repeats: int = 10


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "RiemannianMuon": RiemannianMuon,
    "RiemannianMuon, product": lambda groups: RiemannianMuon(groups, metric="product"),
    "RiemannianAdam": RiemannianAdam,
}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Run, device: str, repeats: int) -> float:
    """Median time of a call, after three that are not counted."""
    times = []
    for repeat in range(repeats + 3):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if repeat >= 3:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def device_seconds(run: Run, device: str, repeats: int) -> float:
    """Time of a call in a queue of `repeats`: without what the host needs to start one."""
    if device != "cuda":
        return seconds(run, device, repeats)
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def exponent(sizes: Iterable[float], costs: Iterable[float]) -> float:
    """The slope of log cost over log size, by least squares.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 3)
    2.0
    """
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    a, b = sum(x) / len(x), sum(y) / len(y)
    return sum((u - a) * (v - b) for u, v in zip(x, y, strict=True)) / sum((u - a) ** 2 for u in x)


def stacks(L: int, rows: int, r: int, device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of the operations on stacks, by name."""
    p, q = (geometry.random(rows, rows, r, batch=(L,), device=device) for _ in range(2))
    D = torch.randn(L, rows, r, device=device) / rows**0.5
    xi = geometry.gauge(p, geometry.Tangent(D, p.S, D.flip(1)))
    w = torch.rand(L, 4, device=device)
    return {
        "tangent": (D, None, None, p.S, xi.Up, w),
        "transport": (p.U, p.V, *xi, q.U, q.V, p.U.mT @ q.U, p.V.mT @ q.V),
        "retract": (p.U, p.S, xi.Up),
        "polar": (p.U, 0.3 * xi.Up, D, None),
        "spectral": (D,),
        "damped_factor": (D,),
        "apply": (D, p.S, torch.ones(L, device=device)),
    }


def tensors(result: Any) -> list[Tensor]:
    found = result if isinstance(result, tuple) else (result,)
    return [x for x in found if isinstance(x, Tensor) and x.numel()]


def layer_error(m: int, n: int, r: int, dtype: torch.dtype, device: str) -> float:
    """The largest error of y, ∂L/∂x and the gradients of the factors against float64, relative to the largest of them.

    For few tokens and for many: the two ways to associate the products.
    """
    from lowrank_geo import operators

    p = geometry.random(m, n, r, device=device)
    worst = 0.0
    for tokens in (max(1, m // 2), 2 * m + 3):
        x, g = (torch.randn(tokens, k, device=device).to(dtype) for k in (n, m))
        a = (x.float() @ p.V).to(dtype)
        for name, given in (
            ("lowrank_linear", (x, *p, torch.randn(m, device=device))),
            ("lowrank_linear_backward", (g, x, *p, a, True)),
        ):
            double = [z.double() if isinstance(z, Tensor) else z for z in given]
            found = tensors(getattr(operators, name)(*given))
            wanted = tensors(getattr(reference, name)(*double))
            size = max(float(y.norm()) for y in wanted)
            worst = max(
                worst,
                *(float((x - y).norm()) / size for x, y in zip(found, wanted, strict=True)),
            )
    return worst


def check(sizes: Sizes, device: str) -> dict[str, float]:
    """The largest relative error of every operation against its twin in float64, those of layers in units of `BOUND`.

    Raises: SystemExit if one is above its bound.
    """
    from lowrank_geo import operators

    worst: dict[str, float] = {}
    for r in (1, 33, *sizes.ranks, *sizes.checked):
        rows = max(r, min(sizes.rows, 2 * r + 5))
        for name, given in stacks(3, rows, r, device).items():
            double = [x.double() if isinstance(x, Tensor) else x for x in given]
            found = tensors(getattr(operators, name)(*given))
            wanted = tensors(getattr(reference, name)(*double))
            if name == "retract":  # a basis depends on conditioning: its projector is compared
                K = double[0] @ double[1] + double[2]
                Q = found[0].double()
                found, wanted = (
                    [Q.mT @ Q, Q @ (Q.mT @ K)],
                    [Q.mT @ Q * 0 + torch.eye(r, device=device), K],
                )
            size = max(float(y.norm()) for y in wanted)
            errors = [float((x - y).norm()) / size for x, y in zip(found, wanted, strict=True)]
            # Six polynomials of float32 reach 4e-3 of the damped sign; the twin has eight. Bases: condition 1e3.
            scale = {"spectral": 500, "damped_factor": 10}.get(name, 1)
            worst[name] = max(worst.get(name, 0.0), max(errors) / scale)
    for dtype, bound in LAYER_BOUNDS.items():
        for r in (1, 33, *sizes.ranks):
            e = layer_error(2 * r + 5, max(r, 65), r, dtype, device)
            name = f"layer, {dtype}".replace("torch.", "")
            worst[name] = max(worst.get(name, 0.0), e * BOUND / bound)
    bad = {name: e for name, e in worst.items() if not e < BOUND}
    if bad:
        raise SystemExit(
            f"gpu.py needs correct kernels before it times them, got errors {bad}; run the tests"
        )
    return worst


def copy_bandwidth(device: str, megabytes: int, repeats: int) -> float:
    """Bytes a second, read and written, of copying one large tensor."""
    source = torch.empty(megabytes << 18, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * ITEM / device_seconds(lambda: target.copy_(source), device, repeats)


def passes(given: dict[str, tuple[Any, ...]]) -> dict[str, tuple[int, Run]]:
    """Every pass over tall matrices: how many of them it reads and writes, and its launch."""
    from lowrank_geo.kernels import gram, polar, retract, spectral, tangent, transport

    U, V, Up, M, Vp, U1, *_ = given["transport"]
    one = torch.ones(U.shape[0], device=U.device)
    no = torch.zeros_like(one, dtype=torch.bool)
    T = torch.eye(M.shape[-1], dtype=torch.float64, device=M.device).expand_as(M).contiguous()
    return {
        "gram": (2, lambda: gram.gram(U, V)),
        "tangent, filtered": (5, lambda: tangent.tangent(*given["tangent"])),
        "transport, write": (4, lambda: transport.transport_write(U, Up, U1, M, M, M)),
        "polar, Grams": (3, lambda: polar.polar_grams(U, Up, V, one)),
        "polar, write": (5, lambda: polar.polar_write(U, Up, V, one, M, M, M, no)),
        "retract, stretch": (3, lambda: retract.stretch(U, M, Up, None)),
        "retract, regram": (1, lambda: retract.regram(U, T)),
        "retract, settle": (2, lambda: retract.settle(U, T, V, no)),
        "retract, products": (3, lambda: retract.products(U, Up, U1)),
        "spectral, write": (2, lambda: spectral.apply(U, M, one)),
    }


def kernel_rows(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """Share of the copy bandwidth of every pass, at every rank."""
    copy = copy_bandwidth(device, 1024 if device == "cuda" else 4, sizes.repeats)
    rows = []
    for r in sizes.ranks:
        given = stacks(sizes.matrices, sizes.rows, r, device)
        size = sizes.matrices * sizes.rows * r * ITEM
        for name, (count, run) in passes(given).items():
            share = count * size / device_seconds(run, device, sizes.repeats) / copy
            rows.append({"pass": name, "r": r, "of_copy": share, "copy_GB_s": copy / 1e9})
    return rows


def operation_rows(sizes: Sizes, device: str, *, compiled: bool = True) -> list[dict[str, Any]]:
    """Whole operations: speed-ups of the kernels over torch and over compiled torch."""
    from lowrank_geo import operators

    rows = []
    for r, name in itertools.product(
        sizes.ranks, ("tangent", "transport", "retract", "polar", "spectral")
    ):
        given = stacks(sizes.matrices, sizes.rows, r, device)[name]
        twin = getattr(reference, name)
        runs = {"triton": getattr(operators, name), "torch": twin}
        if compiled:
            torch._dynamo.reset()
            runs["torch.compile"] = torch.compile(twin)
        times = {
            k: device_seconds(partial(f, *given), device, sizes.repeats) for k, f in runs.items()
        }
        rows.append(
            {
                "operation": name,
                "r": r,
                "speedup": {k: t / times["triton"] for k, t in times.items()},
            }
        )
    return rows


def trainer(module: nn.Module, x: Tensor, dy: Tensor) -> Run:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(dy)

    return run


def with_backend(name: str, run: Run) -> Run:
    def call() -> Any:
        with dispatch.use_backend(name):
            return run()

    return call


def layer_times(
    m: int, n: int, r: int, tokens: int, sizes: Sizes, device: str, *, compiled: bool
) -> dict[str, float]:
    """Seconds of forward and backward in bfloat16 of a dense layer and what stands in for it."""
    kind = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(tokens, n, **kind).requires_grad_()
    dy = torch.randn(tokens, m, **kind)
    layer = LowRankLinear(n, m, r, bias=False, device=device)
    layer.gradient = "tangent"
    dense = nn.Linear(n, m, bias=False, **kind)
    factors = nn.Sequential(
        nn.Linear(n, r, bias=False, **kind), nn.Linear(r, m, bias=False, **kind)
    )
    runs = {
        "triton": with_backend("triton", trainer(layer, x, dy)),
        "torch": with_backend("torch", trainer(layer, x, dy)),
        "two factors": trainer(factors, x, dy),
        "dense": trainer(dense, x, dy),
    }
    if compiled:
        torch._dynamo.reset()
        runs["torch.compile"] = with_backend("torch", trainer(torch.compile(layer), x, dy))
    return {k: seconds(run, device, sizes.repeats) for k, run in runs.items()}


def layer_rows(sizes: Sizes, device: str, *, compiled: bool = True) -> list[dict[str, Any]]:
    """Speed-ups over the dense layer, and the limit mn/(r(m+n)) of products alone."""
    rows = []
    for m, n, r in sizes.layers:
        times = layer_times(m, n, r, sizes.tokens, sizes, device, compiled=compiled)
        speedup = {k: times["dense"] / t for k, t in times.items()}
        rows.append({"shape": [m, n, r], "speedup": speedup, "limit": m * n / (r * (m + n))})
    return rows


def language_model(
    name: str, sizes: Sizes, device: str, budget: float | None, layers: int | None = None
) -> nn.Module:
    """A preset, low-rank at a budget, of another depth where given."""
    torch.manual_seed(0)
    model: nn.Module = decoder(name, context=sizes.context)
    if layers is not None:
        model.blocks = model.blocks[:layers]
    if layers is not None and budget is not None:
        convert(
            model, ratio=budget / 2, init="orthogonal"
        )  # one rank for each shape at every depth
    elif budget is not None:
        convert(
            model, budget=budget, multiple_of=16 if budget_allows(sizes) else 1, init="orthogonal"
        )
    return model.to(device)


def budget_allows(sizes: Sizes) -> bool:
    """Whether ranks can be multiples of 16: widths of the small presets of tests are too narrow."""
    return sizes.rows >= 768


def batch(sizes: Sizes, device: str) -> Tensor:
    """Token ids below 256, which every preset knows.

    Shapes: -> (B, context + 1).
    """
    return torch.randint(
        256, (max(1, sizes.tokens // sizes.context), sizes.context + 1), device=device
    )


def forward_backward(model: nn.Module, tokens: Tensor, device: str) -> Run:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()

    return run


def step_rows(sizes: Sizes, device: str, *, compiled: bool = True) -> list[dict[str, Any]]:
    """The optimizer step as a share of forward, backward and step of one model."""
    rows = []
    for name, make in OPTIMIZERS.items():
        share = {}
        for how in ("triton", "torch", "torch.compile")[: 3 if compiled else 2]:
            backend = "triton" if how == "triton" else "torch"
            with dispatch.use_backend(backend):
                model = language_model(sizes.step_model, sizes, device, sizes.budget)
                optimizer: Any = make(param_groups(model))
                passed = forward_backward(model, batch(sizes, device), device)
                work = seconds(passed, device, sizes.repeats)
                if how == "torch.compile":
                    torch._dynamo.reset()
                    optimizer.compile()
                step = seconds(optimizer.step, device, sizes.repeats)
            share[how] = step / (work + step)
            del model, optimizer, passed
        rows.append({"optimizer": name, "share": share})
    return rows


def train_rows(sizes: Sizes, device: str, *, compiled: bool = True) -> list[dict[str, Any]]:
    """Tokens a second and peak memory of whole training steps, dense and at half of the parameters."""
    rows = []
    contenders = {"dense": None, "triton": "triton", "torch": "torch", "two factors": "torch"}
    for name, backend in contenders.items():
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
        with dispatch.use_backend(backend or "torch"):
            model = language_model(
                sizes.train_model, sizes, device, None if backend is None else sizes.budget
            )
            if name == "two factors":
                to_factors(model)
            optimizer = RiemannianMuon(param_groups(model))
            runs = torch.compile(model, fullgraph=True) if compiled else model
            tokens = batch(sizes, device)
            passed = forward_backward(runs, tokens, device)

            def train(passed: Run = passed, optimizer: torch.optim.Optimizer = optimizer) -> None:
                passed()
                optimizer.step()

            duration = seconds(train, device, max(1, sizes.repeats // 2))
        row = {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_s": tokens[:, 1:].numel() / duration,
            "peak_GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        }
        rows.append(row)
        del model, optimizer, runs, passed, train
    return [{**row, "over_dense": row["tokens_s"] / rows[0]["tokens_s"]} for row in rows]


def prepared(
    sizes: Sizes, device: str, make: Callable[..., Any], layers: int
) -> tuple[nn.Module, Any]:
    """A model of some depth with gradients, and its optimizer after one step."""
    model = language_model(sizes.step_model, sizes, device, sizes.budget, layers)
    optimizer = make(param_groups(model))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    optimizer.step()
    return model, optimizer


def launches(sizes: Sizes, device: str) -> dict[str, list[int]]:
    """How many kernels of the fixed-rank part of a step run, at every depth.

    Raises: SystemExit if depth changes the number: that is a loop over layers.
    """
    found: dict[str, list[int]] = {}
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    for name, make in OPTIMIZERS.items():
        for layers in sizes.depths:
            _, optimizer = prepared(sizes, device, make, layers)
            optimizer.param_groups[:] = [
                g for g in optimizer.param_groups if g["geometry"] == "fixed_rank"
            ]
            with profile(activities=[kind]) as events:
                optimizer.step()
                synchronize(device)
            prefix = "" if device == "cuda" else "lowrank_geo::"
            count = sum(
                e.name.startswith(prefix) and not e.name.startswith(("Memcpy", "Memset"))
                for e in events.events()
            )
            found.setdefault(name, []).append(count)
    grown = {name: counts for name, counts in found.items() if len(set(counts)) > 1}
    if device == "cuda" and grown:
        # One stack, copy or foreach launch may hold a limited number of tensors: that much is not a loop.
        slopes = {
            n: (c[-1] - c[0]) / (sizes.depths[-1] - sizes.depths[0]) for n, c in grown.items()
        }
        if max(slopes.values()) >= 1:
            raise SystemExit(
                f"gpu.py needs launches independent of depth, got {found}; look for a loop over layers"
            )
    return found


def captured(sizes: Sizes) -> dict[str, float]:
    """A step captured in a CUDA graph: the largest difference to the same step run eagerly, and its speed-up."""
    found = {}
    for name, make in OPTIMIZERS.items():
        one, eager = prepared(sizes, "cuda", make, sizes.depths[0])
        two, graphed = prepared(sizes, "cuda", make, sizes.depths[0])
        two.load_state_dict(one.state_dict())
        graphed.load_state_dict(eager.state_dict())
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            q.grad = p.grad.clone()  # type: ignore[union-attr]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            graphed.step()
        graph.replay()
        eager.step()
        torch.cuda.synchronize()
        pairs = zip(one.parameters(), two.parameters(), strict=True)
        difference = max(float((p - q).detach().abs().max()) for p, q in pairs)
        if not difference < 1e-5:
            raise SystemExit(
                f"gpu.py needs a captured step to be the step, got {difference:.2g} for {name}"
            )
        found[name] = seconds(eager.step, "cuda", sizes.repeats) / seconds(
            graph.replay, "cuda", sizes.repeats
        )
    return found


def growth(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """Seconds over rank, tokens and depth with the fitted exponent, and the one that operation counts predict."""
    m, n, r = sizes.layers[0]
    tokens = [sizes.tokens // 4, sizes.tokens // 2, sizes.tokens]
    ranks = list(sizes.ranks)

    def one(rank: int, count: int) -> float:
        return layer_times(m, n, rank, count, sizes, device, compiled=False)["triton"]

    def step(layers: int) -> float:
        _, optimizer = prepared(sizes, device, RiemannianMuon, layers)
        return seconds(optimizer.step, device, sizes.repeats)

    with dispatch.use_backend("triton"):
        found: dict[str, tuple[list[int], list[float], float]] = {
            "layer over rank": (ranks, [one(k, sizes.tokens) for k in ranks], 1.0),
            "layer over tokens": (tokens, [one(r, k) for k in tokens], 1.0),
            "step over depth": (list(sizes.depths), [step(k) for k in sizes.depths], 1.0),
        }
    return [
        {
            "cost": name,
            "at": at,
            "ratio": [t / times[0] for t in times],
            "exponent": exponent(at, times),
            "predicted": p,
        }
        for name, (at, times, p) in found.items()
    ]


def show(name: str, result: Any) -> None:
    """A list of records as a table, anything else as it is."""
    print(f"\n## {name}")
    if not isinstance(result, list):
        print(json.dumps(result))
        return

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {v:.2f}" for k, v in value.items())
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    print(table(list(result[0]), [[cell(v) for v in row.values()] for row in result]))


def parts(sizes: Sizes, device: str) -> dict[str, Run]:
    """What is measured, in the order of weight."""
    return {
        "correctness": lambda: check(sizes, device),
        "kernels": lambda: kernel_rows(sizes, device),
        "layers": lambda: layer_rows(sizes, device),
        "step": lambda: step_rows(sizes, device),
        "launches": lambda: launches(sizes, device),
        "training": lambda: train_rows(sizes, device),
        "captured step": lambda: captured(sizes),
        "operations": lambda: operation_rows(sizes, device),
        "growth": lambda: growth(sizes, device),
    }


class OutOfTime(BaseException):
    """Raised by the alarm in the middle of a part; no handler for errors takes it for one."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` after some seconds, if this is not over by then."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(
    todo: dict[str, Run], minutes: float, device: str = "cpu", store: Lines | None = None
) -> dict[str, Any]:
    """Run the parts until the time is up; what came too late is None, what failed is its error.

    With a store, a part is a line there as soon as it ends, and one that is there is not measured again.
    """
    end, found = time.monotonic() + 60 * minutes, {}
    for name, run in todo.items():
        settings = {"benchmark": "gpu", "device": device, "part": name}
        left = end - time.monotonic()
        try:
            if left < 0.15 * 60 * minutes:
                raise OutOfTime
            with alarm(left):
                if store is None:
                    found[name] = run()
                else:
                    # The file itself may be tracked, and writing to it makes the tree dirty.
                    settings["code"] = environment()["commit"].removesuffix("-dirty")
                    found[name] = store.get(settings, lambda run=run: {"result": run()})["result"]  # type: ignore[misc]
        except OutOfTime:
            found[name] = None
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            # The GPU is lent for minutes: one part that fails must not cost the others.
            found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
            traceback.print_exc()
        show(name, "left out: out of time" if found[name] is None else found[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a line for each part, and where to go on")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu.py needs a CUDA device, got none; run it where torch.cuda.is_available()",
            file=sys.stderr,
        )
        sys.exit(2)
    device = torch.cuda.get_device_name()
    print(f"{device}: {lowrank_geo.backend('cuda').reason}")
    store = None if arguments.out is None else Lines(arguments.out)
    found = measure(parts(Sizes(), "cuda"), MINUTES, device, store)
    record = json.dumps({"benchmark": "gpu", "device": device, **found, **environment()})
    print(record)
    sys.exit(any(isinstance(x, dict) and "failed" in x for x in found.values()))


if __name__ == "__main__":
    main()
