"""report.html of a run on images, from its folder alone; it needs no network and no script, and names no patient."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_geo import page, plots
from lowrank_geo.canvas import Figure, to_svg
from lowrank_geo.images import figures
from lowrank_geo.images.tasks import TASKS, Task
from lowrank_geo.recorded import Metrics, Series, number, printable, read_metrics
from lowrank_geo.report import duration, plan_table
from lowrank_geo.train.run_folder import kind_of, read_record

EMPTY = Series((), ())
NAMES = {"dice": "Dice", "iou": "mIoU", "f1": "F1"}
# The path of the data is not told: folders of scans are often called after a patient.
UNTOLD = ("data",)
CAPTIONS = {
    "Loss": "Healthy: both curves fall and stay close together. Validation loss that rises while training loss falls "
    "is overfitting.",
    "Scores": "The band is the 95 % interval of the first score over resampled patients or images. The epoch with the "
    "best first score is the one that is kept.",
    "Learning rate": "Divided by ten whenever the validation loss has not fallen for --patience epochs.",
    "Gradient norm": "Healthy: flat or slowly falling. Steady growth announces divergence.",
    "Confusions": "Per cent of each true class (row) that was taken for each class (column), on the test images.",
    "Single images": "The curve reaches a part of the test images where they have at most this score.",
}


def write_report(run: str | Path) -> Path:
    """Write report.html into a run's folder, in any state of the run, and return its path.

    Raises: FileNotFoundError if there is no run; ValueError if its run.json is corrupt or of another command.
    """
    path = Path(run).resolve()
    record, metrics = read_record(path), read_metrics(path)
    task = TASKS.get(kind_of(record))
    if task is None:
        raise ValueError(
            f"a report on images needs a run of {' or '.join(TASKS)}, got one of {kind_of(record)}; "
            "use lowrank-geo inspect"
        )
    title = f"lowrank-geo {task.config.command}: {printable(path.name)}"
    try:
        parts = _sections(task, path, title, record, metrics)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path / 'run.json'} needs to be as the run wrote it, got {error!r} in it; resume the run"
        ) from error
    report = path / "report.html"
    page.write_page(report, page.page(title, parts, pictures=True))
    return report


def _sections(
    task: Task, path: Path, title: str, record: dict[str, Any], metrics: Metrics
) -> list[str]:
    result = _part(record, "result")
    drawn = list(_figures(task, record, metrics)) or [page.paragraph("Nothing is recorded yet.")]
    config = {k: v for k, v in _part(record, "config").items() if k not in UNTOLD}
    return [
        page.heading(title, str(record.get("status", "unknown"))),
        page.paragraph(_summary(record)),
        page.key_numbers(_key_numbers(record, metrics)),
        page.section("Scores", _scores(result)) if result else "",
        page.section("Training", '<div class="figures">', *drawn, "</div>"),
        page.section("Cases, the worst first", *_cases(path, result)) if result else "",
        page.section("Plan: which layer has which rank", plan_table(record)),
        page.section("Configuration", page.settings(config)),
        page.section("Environment", page.settings(_part(record, "environment"))),
    ]


def _part(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _summary(record: dict[str, Any]) -> str:
    config, model = _part(record, "config"), _part(record, "model")
    sizes = ", ".join(
        f"{k} {config[k]}" for k in ("width", "depth", "blocks", "gamma") if k in config
    )
    told = (
        f"{model.get('network', 'A network')} ({sizes}), trained with {config.get('optimizer')}. "
    )
    told += f"Data: {_part(record, 'data').get('description', 'unnamed')}."
    result = _part(record, "result")
    if result:
        told += (
            f" Judged on {result['images']} {_set(result)} images of {result['groups']} patients or different images, "
            f"with the weights of epoch {result['epoch']}, the best on the validation images."
        )
    return told


def _set(result: dict[str, Any]) -> str:
    return "test" if result.get("judged_on") == "test" else "validation (there are no test)"


def _key_numbers(record: dict[str, Any], metrics: Metrics) -> Iterator[tuple[str, str, str]]:
    result = _part(record, "result")
    for name, (mean, low, high) in list(result.get("scores", {}).items())[:2]:
        yield NAMES.get(name, name), f"{mean:.3f}", f"{low:.3f} to {high:.3f}"
    counts = _part(record, "parameters")
    dense, ours = (int(number(counts.get(key)) or 0) for key in ("dense", "low_rank"))
    if dense and ours:
        yield "parameters", f"{ours:,}", f"{ours / dense:.1%} of {dense:,} dense"
    seconds = metrics.train.get("seconds", EMPTY)
    if len(seconds.values):
        epochs = len(metrics.held_out.steps)
        yield "training time", duration(float(seconds.values[-1])), f"{epochs} epochs"
    if "milliseconds_per_image" in result:
        yield "prediction", f"{result['milliseconds_per_image']:.1f} ms", "an image"


def _scores(result: dict[str, Any]) -> str:
    rows = [
        (NAMES.get(name, name), f"{mean:.4f}", f"{low:.4f} to {high:.4f}")
        for name, (mean, low, high) in result["scores"].items()
    ]
    rows.append(("loss", f"{result['loss']:.4f}", ""))
    return page.table(("score", "mean", "95 % interval"), rows, right=(1, 2))


def _figures(task: Task, record: dict[str, Any], metrics: Metrics) -> Iterator[str]:
    for title, drawn in _drawings(task, record, metrics):
        half = drawn.get_figwidth() < plots.FULL[0]
        yield page.figure(to_svg(drawn, title), title, CAPTIONS[title], half=half)


def _drawings(task: Task, record: dict[str, Any], metrics: Metrics) -> Iterator[tuple[str, Figure]]:
    train, held = metrics.train, metrics.evaluated
    loss, lr, norm = (train.get(key, EMPTY) for key in ("loss", "lr", "grad_norm"))
    if len(loss.steps):
        yield "Loss", plots.loss(loss, metrics.held_out, unit=task.unit)
    epochs = held.get("epoch", EMPTY).values
    if len(epochs):
        names = [name for name in task.means(np.ones((1, 2, 2))) if name in held]
        band = (held["low"].values, held["high"].values)
        values = {NAMES.get(name, name): list(held[name].values) for name in names}
        best = held["best"].values[-1]
        yield "Scores", figures.scores(list(epochs), values, band, float(best))  # type: ignore[arg-type]
    if len(lr.steps):
        yield "Learning rate", plots.learning_rate(lr)
        yield "Gradient norm", plots.gradient_norm(norm)
    result = _part(record, "result")
    if result:
        classes = [printable(name) for name in _part(record, "data")["classes"]]
        yield "Confusions", figures.confusion(np.asarray(result["confusion"]), classes)
        what = "Dice" if task.config.command == "segment" else "probability of the true class"
        yield "Single images", figures.distribution(result["per_image"], f"{what} (0 to 1)")


def _cases(run: Path, result: dict[str, Any]) -> Iterator[str]:
    segmented = "truth" not in (result["cases"] or [{}])[0]
    if segmented:
        yield page.paragraph(
            "Left: the image. Middle: the truth. Right: the prediction, with the outline of the truth in white."
        )
    else:
        yield page.paragraph(
            "The true class, and what the network takes the image for, with the probability that it gives to that. "
            "In the order of the probability of the true class."
        )
    yield f'<div class="cases{" wide" * segmented}">'
    for case in result["cases"]:
        file = run / "cases" / Path(case["file"]).name
        if not file.is_file():
            continue
        name = printable(case["name"])
        if segmented:
            told = f"{name}: Dice {case['value']:.3f}"
        else:
            truth, found = printable(case["truth"]), printable(case["found"])
            sure = f"({case['probability']:.0%})"
            told = (
                f"{name}: {truth}, {f'taken for {found}' if truth != found else 'rightly'} {sure}"
            )
        yield page.picture(file.read_bytes(), told, told)
    yield "</div>"
