"""A plan as a table of aligned columns."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank_geo.plan import Entry, Plan

HEAD = ("layer", "kind", "shape", "rank", "parameters", "dense", "")
LEFT = (0, 1, 6)  # columns of words


def table(plan: "Plan") -> str:
    """One line for each weight matrix, one for all other parameters, and the totals."""
    rows = [HEAD, *(_row(entry) for entry in plan.entries)]
    other = plan.dense_parameters - sum(entry.dense_parameters for entry in plan.entries)
    rows.append(("everything else", "", "", "", f"{other:,}", f"{other:,}", ""))
    rows.append(("total", "", "", "", f"{plan.parameters:,}", f"{plan.dense_parameters:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join([*(_aligned(row, widths) for row in rows), totals(plan)])


def totals(plan: "Plan") -> str:
    """The last line: the size of the model, what the budget allows and what is left of it."""
    share = plan.parameters / max(plan.dense_parameters, 1)
    line = f"{len(plan.ranks)} low-rank layers, {share:.2%} of the dense model"
    if plan.budget is None:
        return line
    limit = plan.parameters + plan.slack
    return f"{line}; the budget {plan.budget:g} allows {limit:,}, slack {plan.slack:,}"


def _row(entry: "Entry") -> tuple[str, ...]:
    note = entry.reason if entry.error is None else f"error {entry.error:.2g} {entry.reason}"
    return (
        entry.name or "(the model itself)",
        entry.kind,
        f"{entry.m} x {entry.n}",
        "dense" if entry.rank is None else str(entry.rank),
        f"{entry.parameters:,}",
        f"{entry.dense_parameters:,}",
        note.strip(),
    )


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    cells = zip(row, widths, strict=True)
    return "  ".join(
        c.ljust(w) if i in LEFT else c.rjust(w) for i, (c, w) in enumerate(cells)
    ).rstrip()
