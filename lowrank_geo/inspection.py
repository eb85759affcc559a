"""Look at a run: the factors in its newest valid checkpoint, read without building the model.

Nothing here writes, and shapes are compared with run.json before a tensor is read.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_geo.diagnostics import drift, singular_values
from lowrank_geo.recorded import printable
from lowrank_geo.train.checkpoint import FILES, newest
from lowrank_geo.train.run_folder import read_record

try:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lowrank_geo.inspection needs rich, which is not installed; pip install 'lowrank-geo[cli]'"
    ) from missing

BARS, CELLS = "▁▂▃▄▅▆▇█", 8
NUMBERS = ("shape", "rank", "σ max", "σ min", "effective\nrank", "stable\nrank", "|UᵀU−I|")


class Layer(NamedTuple):
    """One low-rank layer of a checkpoint.

    `effective_rank` is exp(entropy of σ / Σσ) (Roy and Vetterli, EUSIPCO 2007), `stable_rank` Σσ² / σ_max²,
    `drift` the largest entry of |UᵀU − I| and |VᵀV − I|.
    """

    name: str
    m: int
    n: int
    rank: int
    sigma: tuple[float, ...]  # descending
    effective_rank: float
    stable_rank: float
    drift: float


class Inspection(NamedTuple):
    """A run at its newest valid checkpoint; the dense counts are those of the model with every layer multiplied out.

    `passed_over` says what is wrong with newer checkpoints.
    """

    run: Path
    status: str
    step: int
    layers: tuple[Layer, ...]
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    passed_over: tuple[str, ...] = ()


def inspect(run: str | Path) -> Inspection:
    """Measure the factors in the newest valid checkpoint of a run.

    Raises: FileNotFoundError if there is no run or no checkpoint; ValueError if no checkpoint is valid, or files do
    not belong together.
    """
    path = Path(run)
    record = read_record(path)
    found = newest(path / "checkpoints")
    if found is None:
        raise FileNotFoundError(
            f"inspect needs a run with a checkpoint, got {path} without one; let pretrain reach its first"
        )
    with safe_open(found.path / FILES[0], framework="pt") as tensors:
        inspection = _measure(path, record, found.state["step"], tensors)
    return inspection._replace(passed_over=tuple(found.problems))


def _measure(path: Path, record: dict[str, Any], step: int, tensors: Any) -> Inspection:
    headers = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (not a dict)
    shapes = {key: tuple(header.get_shape()) for key, header in headers.items()}
    widths = {key: _bytes_each(header.get_dtype()) for key, header in headers.items()}
    names = _triples(shapes, record)
    size = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    total, dense = sum(size.values()), sum(size.values())
    total_bytes = dense_bytes = sum(size[key] * widths[key] for key in size)
    layers = []
    for name in names:
        U, S, V = keys = [_key(name, factor) for factor in "USV"]
        m, n, rank = shapes[U][0], shapes[V][0], shapes[S][0]
        dense += m * n - sum(size[key] for key in keys)
        dense_bytes += m * n * widths[S] - sum(size[key] * widths[key] for key in keys)
        factors = [tensors.get_tensor(key) for key in keys]
        layers.append(_layer(printable(name), m, n, rank, factors))
    status = printable(record.get("status", "unknown"))
    return Inspection(path, status, step, tuple(layers), total, dense, total_bytes, dense_bytes)


def _layer(name: str, m: int, n: int, rank: int, factors: list[Tensor]) -> Layer:
    U, S, V = factors
    sigma = singular_values({name: S})[name]
    share = sigma / sigma.sum() if sigma.sum() else sigma
    effective = torch.special.entr(share).sum().exp().item() if sigma.sum() else 0.0
    stable = (sigma.square().sum() / sigma[0].square()).item() if sigma[0] else 0.0
    return Layer(name, m, n, rank, tuple(sigma.tolist()), effective, stable, drift((U, V)).item())


def _triples(shapes: dict[str, tuple[int, ...]], record: dict[str, Any]) -> list[str]:
    """Names of the low-rank layers in the order of the plan, checked against it."""
    found = {key[:-1].rstrip(".") for key in shapes if key == "S" or key.endswith(".S")}
    found = {name for name in found if all(_key(name, factor) in shapes for factor in "UV")}
    plan = record.get("plan")
    entries = plan.get("entries") if isinstance(plan, dict) else None
    planned = {
        entry["name"]: (entry.get("m"), entry.get("n"), entry["rank"])
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry.get("rank")
    }
    for name in sorted(found | planned.keys()):
        U, S, V = (shapes.get(_key(name, factor), ()) for factor in "USV")
        m, n, r = planned.get(name, tuple(shape[0] if shape else 0 for shape in (U, V, S)))
        if (U, S, V) != ((m, r), (r, r), (n, r)) or not r:
            raise ValueError(
                f"inspect needs factors of one {m}x{n} layer {printable(name)!r} of rank {r}, got U {U}, S {S}, V {V}; "
                "this checkpoint is corrupt or belongs to another run.json"
            )
    return [*planned, *sorted(found - planned.keys(), key=_natural)]


def _key(name: str, factor: str) -> str:
    return f"{name}.{factor}" if name else factor


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", name)]


def _bytes_each(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1  # BOOL


def render(inspection: Inspection) -> RenderableType:
    """The inspection for a terminal, with each layer's singular values as a small picture."""
    title = f"{printable(inspection.run.name)}, {inspection.status}, step {inspection.step}"
    # Without a box, nine columns and the names of a transformer's layers fit 80 characters.
    table = Table(box=None, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("layer", overflow="fold")
    for head in NUMBERS:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("spectrum", no_wrap=True)
    for x in inspection.layers:
        row = [x.name, f"{x.m}x{x.n}", str(x.rank), f"{x.sigma[0]:.3g}", f"{x.sigma[-1]:.3g}"]
        row += [f"{x.effective_rank:.1f}", f"{x.stable_rank:.1f}", f"{x.drift:.1e}", _bars(x.sigma)]
        table.add_row(*map(Text, row))
    shares = [
        f"{label}: {ours:,} of {dense:,} in the dense model ({ours / max(dense, 1):.1%})"
        for label, ours, dense in (
            ("parameters", inspection.parameters, inspection.dense_parameters),
            ("bytes", inspection.bytes, inspection.dense_bytes),
        )
    ]
    notes = [f"passed over: {printable(problem)}" for problem in inspection.passed_over]
    return Group(Text(title, style="bold"), table, *map(Text, shares + notes))


def _bars(sigma: tuple[float, ...]) -> str:
    picked = [sigma[i * len(sigma) // CELLS] for i in range(CELLS)] if len(sigma) > CELLS else sigma
    top = sigma[0] or 1.0
    return "".join(BARS[min(int(s / top * 8), 7)] if s == s and top == top else "?" for s in picked)
