"""What finetune shows: a line when a run ends, and the table of a comparison."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from lowrank_geo.finetune.config import FinetuneConfig

COLUMNS = (
    "method",
    "seeds",
    "accuracy",
    "loss",
    "trained parameters",
    "samples/s",
    "peak memory, MiB",
)


def quiet() -> None:
    """No bars and reports of transformers; errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run_once(config: FinetuneConfig, out: Path | None, method: str) -> None:
    """One run, and where it was saved."""
    from lowrank_geo.finetune.run import finetune

    quiet()
    result = finetune(config, out, method=method)
    typer.echo(sentence(result))
    if out is not None:
        typer.echo(f"saved: {out}")
    if not math.isfinite(result["loss"]):
        raise ValueError(
            f"finetune needs a loss that stays finite, got {result['loss']}; pass a smaller --lr"
        )


def sentence(result: dict[str, Any]) -> str:
    """A result on one line.

    >>> sentence({"method": "lora", "loss": 0.5, "trained": 1200, "total": 9000, "samples_per_second": 3.04})
    'lora: held-out loss 0.5000, 1,200 of 9,000 parameters trained, 3.0 samples/s'
    """
    score = f"accuracy {result['accuracy']:.3f}, " if "accuracy" in result else ""
    return (
        f"{result['method']}: {score}held-out loss {result['loss']:.4f}, {result['trained']:,} of "
        f"{result['total']:,} parameters trained, {result['samples_per_second']:.1f} samples/s"
    )


def run_comparison(
    config: FinetuneConfig, out: Path | None, methods: list[str], seeds: int
) -> None:
    """Every method with every seed, then one table; the results go to `out`/comparison.jsonl if it is given."""
    from lowrank_geo.finetune.run import compare
    from lowrank_geo.finetune.saving import check_empty, plain

    methods = list(dict.fromkeys(name.strip() for name in methods))  # each once
    if out is not None:
        check_empty(out)
    if seeds < 1:
        raise ValueError(f"--seeds needs to be at least 1, got {seeds}; raise it")
    quiet()
    results = compare(config, methods, seeds, report=lambda result: typer.echo(sentence(result)))
    table, console = comparison(methods, results), Console(markup=False, soft_wrap=True)
    # A pipe counts as 80 columns, and words would be broken to fit.
    console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({**plain(result), "config": asdict(config)}) + "\n" for result in results
        ]
        (out / "comparison.jsonl").write_text("".join(lines))
        typer.echo(f"saved: {out}")


def comparison(methods: list[str], results: list[dict[str, Any]]) -> Table:
    """Mean and standard deviation over seeds; speed and memory are means."""
    table = Table(*COLUMNS)
    for method in methods:
        rows = [result for result in results if result["method"] == method]
        table.add_row(
            method,
            str(len(rows)),
            spread(row["accuracy"] for row in rows if "accuracy" in row),
            spread(row["loss"] for row in rows),
            f"{rows[0]['trained']:,}",
            f"{statistics.fmean(row['samples_per_second'] for row in rows):.1f}",
            f"{statistics.fmean(row['peak_memory'] for row in rows) / 2**20:,.0f}",
        )
    return table


def spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation, a dash for no values.

    >>> spread([1.0, 2.0]), spread([1.0]), spread([])
    ('1.500 ± 0.707', '1.000', '-')
    """
    found = list(values)
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.3f}"
    return f"{mean} ± {statistics.stdev(found):.3f}" if len(found) > 1 else mean
