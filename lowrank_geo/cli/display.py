"""What a training shows: the plan, a progress bar, a line for each evaluation, where the report is."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowrank_geo.plan import Plan
from lowrank_geo.train.metrics import Line


class Display:
    """A listener of a run; use it in a `with` block."""

    def __init__(self) -> None:
        # Names of files and layers are shown as they are, never read as markup.
        self.console = Console(markup=False, highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.running = False

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.running:  # a second stop would print an empty line
            self.progress.stop()
        self.running = False

    def __call__(self, line: Line) -> None:
        getattr(self, f"_{line['kind']}")(line)

    def _start(self, line: Line) -> None:
        for note in line["notes"]:
            self.console.print(f"passed over: {note}")
        self.console.print(summary(line["plan"]))
        if line["step"]:
            self.console.print(f"resumed at step {line['step']} of {line['steps']}")
        if line["step"] == line["steps"]:
            return
        self.task = self.progress.add_task(
            "training", total=line["steps"], completed=line["step"], loss=float("nan"), speed=""
        )
        self.progress.start()
        self.running = True

    def _train(self, line: Line) -> None:
        self.progress.update(
            self.task,
            completed=line["step"],
            loss=line["loss"],
            speed=speed(line),
        )

    def _eval(self, line: Line) -> None:
        self.console.print(evaluated(line))

    def _test(self, line: Line) -> None:
        self._stop()
        self.console.print(tested(line))

    def _diagnostics(self, line: Line) -> None:
        pass

    def _end(self, line: Line) -> None:
        self._stop()
        self.console.print(f"report: {line['report']}")


def speed(line: Line) -> str:
    """How fast a step was.

    >>> speed({"tokens_per_second": 1234.5}), speed({"images_per_second": 7.25})
    ('1,234 tokens/s', '7.2 images/s')
    """
    if "tokens_per_second" in line:
        return f"{line['tokens_per_second']:,.0f} tokens/s"
    return f"{line['images_per_second']:,.1f} images/s"


def evaluated(line: Line) -> str:
    """What was measured on data held out.

    >>> evaluated({"step": 2, "loss": 1.5})
    'step 2: held-out loss 1.5000'
    """
    if "score" not in line:
        return f"step {line['step']}: held-out loss {line['loss']:.4f}"
    score = line["score"]
    between = f"{line['low']:.3f} to {line['high']:.3f}"
    best = ", the best so far" if line["best"] == line["epoch"] else ""
    return (
        f"epoch {line['epoch']}: validation loss {line['loss']:.4f}, "
        f"{score} {line[score]:.4f} ({between}){best}"
    )


def tested(line: Line) -> str:
    """The scores of the best epoch with their intervals."""
    scores = (
        f"{name} {mean:.4f} ({low:.3f} to {high:.3f})"
        for name, (mean, low, high) in line["scores"].items()
    )
    return f"{line['judged_on']} images, epoch {line['epoch']}: {', '.join(scores)}"


def summary(plan: Plan) -> str:
    """A plan in one line: how many layers, which ranks, how many parameters, what the budget leaves."""
    ranks = [entry.rank for entry in plan.entries if entry.rank is not None]
    some = f"ranks {min(ranks)} to {max(ranks)}" if ranks else "no layer"
    limit = "" if plan.budget is None else f", {plan.slack:,} below the budget of {plan.budget:g}"
    return (
        f"plan: {len(ranks)} of {len(plan.entries)} layers low-rank, {some}; "
        f"{plan.parameters:,} of {plan.dense_parameters:,} parameters "
        f"({plan.parameters / plan.dense_parameters:.1%}){limit}"
    )
