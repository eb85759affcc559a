"""report.html: one page about one run, from run.json and metrics.jsonl; it needs no network and no script."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_geo import page, plots
from lowrank_geo.canvas import Figure, to_svg
from lowrank_geo.recorded import Metrics, Series, number, printable, read_metrics
from lowrank_geo.train.run_folder import read_record

EMPTY = Series((), ())


def write_report(run: str | Path) -> Path:
    """Write report.html into a run's folder, in any state of the run, and return its path.

    Raises: FileNotFoundError if there is no run; ValueError if its run.json is corrupt or foreign.
    """
    path = Path(run).resolve()
    record, metrics = read_record(path), read_metrics(path)
    title = f"Low-rank pre-training: {printable(path.name)}"
    figures = list(_figures(record, metrics)) or [page.paragraph("Nothing has been recorded yet.")]
    samples = [
        page.sample(str(s.get("prompt", "")), str(s.get("text", "")))
        for s in _objects(record.get("samples"))
    ]
    parts = [
        page.heading(title, str(record.get("status", "unknown"))),
        page.paragraph(_summary(record, metrics)),
        page.key_numbers(_key_numbers(record, metrics)),
        page.section("Training", '<div class="figures">', *figures, "</div>"),
        page.section("Plan: which layer has which rank", plan_table(record)),
        page.section("Samples", *(samples or [page.paragraph("No text was generated.")])),
        page.section("Configuration", page.settings(_part(record, "config"))),
        page.section("Environment", page.settings(_part(record, "environment"))),
    ]
    report = path / "report.html"
    page.write_page(report, page.page(title, parts))
    return report


def _part(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def _entries(record: dict[str, Any]) -> list[dict[str, Any]]:
    return _objects(_part(record, "plan").get("entries"))


def _unit(record: dict[str, Any]) -> str:
    return "byte" if _part(record, "config").get("tokenizer") == "bytes" else "token"


def _last(series: Series) -> float | None:
    return float(series.values[-1]) if len(series.values) else None


def _counts(record: dict[str, Any]) -> tuple[int, int]:
    """Parameters of the dense model and of ours, 0 where unknown."""
    counts = _part(record, "parameters")
    dense, ours = (number(counts.get(key)) or 0 for key in ("dense", "low_rank"))
    return int(dense), int(ours)


def _summary(record: dict[str, Any], metrics: Metrics) -> str:
    """What was trained on what, with which result; says only what is known."""
    config, model = _part(record, "config"), _part(record, "model")
    sizes = [
        f"{key} {model[key]}" for key in ("layers", "width", "heads", "context") if key in model
    ]
    told = f"Model {config.get('model', 'unnamed')}" + (f" ({', '.join(sizes)})" if sizes else "")
    told += f", trained with {config.get('optimizer', 'an unnamed optimizer')}"
    train = metrics.train.get("loss", EMPTY)
    if len(train.steps):
        told += f" for {int(train.steps[-1]):,} of {config.get('steps', 'unknown')} steps"
    told += f". Data: {_part(record, 'data').get('description', 'unnamed')}"
    dense, ours = _counts(record)
    budget = number(_part(record, "plan").get("budget"))
    if dense and ours:
        told += f". Parameters: {ours:,}, {ours / dense:.1%} of the {dense:,} of the dense model"
        told += f" (budget {budget:.1%})" if budget else ""
    final, unit = _last(metrics.held_out), _unit(record)
    if final is not None:
        bits = final / math.log(2)
        told += f". Loss on held-out text: {final:.4f} nats or {bits:.4f} bits per {unit}"
    return f"{told}."


def _key_numbers(record: dict[str, Any], metrics: Metrics) -> Iterator[tuple[str, str, str]]:
    unit, final = _unit(record), _last(metrics.held_out)
    if final is not None:
        yield "held-out loss", f"{final:.3f}", f"nats per {unit}; {final / math.log(2):.3f} bits"
    dense, ours = _counts(record)
    if dense and ours:
        yield "parameters", f"{ours:,}", f"{ours / dense:.1%} of {dense:,} dense"
    seconds, tokens = (_last(metrics.train.get(key, EMPTY)) for key in ("seconds", "tokens"))
    if seconds is not None:
        yield (
            "training time",
            duration(seconds),
            "" if tokens is None else f"{int(tokens):,} {unit}s",
        )
        if tokens is not None and seconds > 0:
            yield "speed", f"{tokens / seconds:,.0f} {unit}s/s", "mean over the run"


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(171.2), duration(7260), duration(3.14)
    ('2 min 51 s', '2 h 1 min', '3.1 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plan_table(record: dict[str, Any]) -> str:
    """The layers of a run's plan, with their ranks and sizes."""
    rows = []
    for place, entry in enumerate(_entries(record), 1):
        rank, m, n, dense, ours = (
            number(entry.get(key)) or 0.0
            for key in ("rank", "m", "n", "dense_parameters", "parameters")
        )
        error = number(entry.get("error"))
        remark = entry.get("reason") or ("" if error is None else f"relative error {error:.3g}")
        shape = f"{m:.0f} × {n:.0f}" if m and n else ""
        share = f"{rank:.0f} ({rank / min(m, n):.0%})" if rank and shape else "dense"
        name = printable(entry.get("name", "unnamed"))
        counts = (f"{dense:,.0f}", f"{ours:,.0f}")
        rows.append((place, name, entry.get("kind", ""), shape, share, *counts, remark))
    head = ("", "layer", "kind", "shape", "rank", "dense parameters", "parameters", "remark")
    return page.table(head, rows, right=(0, 3, 4, 5, 6))


CAPTIONS = {
    "Loss": "Healthy: both curves fall and stay close together. Held-out loss that rises while training loss falls "
    "is overfitting; jumps ask for a smaller learning rate.",
    "Learning rate": "Healthy: the schedule that was asked for, ending low so that the last steps only refine.",
    "Gradient norm": "Healthy: flat or slowly falling after the warmup. Steady growth or lone peaks announce "
    "divergence.",
    "Rank per layer": "Healthy: no layer sits at the minimum while another keeps its full rank.",
    "Singular values over training": "Median (line), middle 80 % (dark) and full range (light) over the layers of a "
    "kind. Healthy: the fan settles and its lower edge stays off the floor (10⁻⁶ of the top): the whole rank is used.",
    "Singular values at the end": "From the best to the worst conditioned layer. Healthy: a slow decline; a cliff "
    "means that a smaller rank would do.",
    "Drift of the frames": "Healthy: flat and far below the dotted bound; a slope means that the step loses "
    "orthonormality.",
    "Transport of the momentum": "Healthy: close to 1. Low values mean that steps turn the tangent space so far that "
    "momentum is lost; try a smaller learning rate.",
    "Size": "Only the dark part shrinks with the rank; if it is small, a lower budget gains little.",
}


def _figures(record: dict[str, Any], metrics: Metrics) -> Iterator[str]:
    """The figures for which there is anything to draw."""
    for title, draw in _drawings(record, metrics).items():
        drawn = draw()
        half = drawn.get_figwidth() < plots.FULL[0]
        yield page.figure(to_svg(drawn, title), title, CAPTIONS[title], half=half)


def _drawings(record: dict[str, Any], metrics: Metrics) -> dict[str, Callable[[], Figure]]:
    found: dict[str, Callable[[], Figure]] = {}
    train, unit = metrics.train, f"nats per {_unit(record)}"
    loss, lr, norm = (train.get(key, EMPTY) for key in ("loss", "lr", "grad_norm"))
    history = {key: [x for x in lines if x[1]] for key, lines in metrics.layers.items()}
    spectra, drifts, transports = (
        history[key] for key in ("spectra", "orthonormality", "transport")
    )
    if len(loss.steps) or len(metrics.held_out.steps):
        found["Loss"] = lambda: plots.loss(loss, metrics.held_out, unit=unit)
    if len(lr.steps):
        found["Learning rate"] = lambda: plots.learning_rate(lr)
    if len(norm.steps):
        found["Gradient norm"] = lambda: plots.gradient_norm(norm)
    ranks = _ranks(record, history["ranks"][-1][1] if history["ranks"] else {})
    if ranks:
        found["Rank per layer"] = lambda: plots.ranks(*zip(*ranks, strict=True))
    if spectra:
        found["Singular values over training"] = lambda: plots.spectra(spectra)
        found["Singular values at the end"] = lambda: plots.final_spectra(spectra[-1][1])
    if drifts:
        found["Drift of the frames"] = lambda: plots.orthonormality(drifts)
    if transports:
        found["Transport of the momentum"] = lambda: plots.contraction(transports)
    if all(_counts(record)):
        found["Size"] = lambda: plots.parameters(*_split(record))
    return found


def _ranks(record: dict[str, Any], latest: Mapping[str, float]) -> list[tuple[str, int, int]]:
    """(name, rank, full rank) of each low-rank layer of the plan; a rank recorded later replaces the planned one."""
    known = []
    for entry in _entries(record):
        name = printable(entry.get("name", "unnamed"))
        rank, m, n = (int(number(entry.get(key)) or 0) for key in ("rank", "m", "n"))
        if rank and m and n:
            known.append((name, int(latest.get(name, rank)), min(m, n)))
    return known


def _split(record: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parameters (of the layers with a rank, of all others), for the dense model and for ours."""
    factored = [entry for entry in _entries(record) if number(entry.get("rank"))]
    parts = []
    for total, key in zip(_counts(record), ("dense_parameters", "parameters"), strict=True):
        inside = min(total, int(sum(number(entry.get(key)) or 0 for entry in factored)))
        parts.append((inside, total - inside))
    return parts[0], parts[1]
