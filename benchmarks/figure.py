"""The README's figure: loss over learning rate, from the runs of benchmarks/pretrain.py.

python benchmarks/figure.py quick     # writes docs/figures/pretrain.png
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

ROOT = Path(__file__).parent
STYLE = {  # colour-blind safe, and told apart by marker in print
    "RiemannianMuon": ("#0072B2", "o"),
    "RiemannianMuon, product metric": ("#56B4E9", "s"),
    "two factors, Muon": ("#D55E00", "^"),
    "narrow dense (width 64), Muon": ("#7F7F7F", "v"),
    "two factors, AdamW": ("#E69F00", "D"),
    "U, S, V with AdamW": ("#009E73", "P"),
    "RiemannianAdam, betas of AdamW": ("#CC79A7", "X"),
}


def curves(path: Path) -> dict[str, dict[float, list[float]]]:
    """Losses at rank width / 6 by method and learning rate."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in path.read_text().splitlines():
        record = json.loads(line)
        *ratio, method = record["method"].split(" | ")
        if ratio in ([], ["1/6"]):  # dense models have no rank
            found[method][record["lr"]].append(record["loss"])
    return found


def draw(found: dict[str, dict[float, list[float]]]) -> Figure:
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for method, (colour, marker) in STYLE.items():
        rates = sorted(found[method])
        means = [fmean(found[method][lr]) for lr in rates]
        axes.plot(rates, means, color=colour, marker=marker, label=method)
        for lr in rates:
            axes.plot([lr] * len(found[method][lr]), found[method][lr], "_", color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [0.002, 0.004, 0.008, 0.016, 0.032], ["0.002", "0.004", "0.008", "0.016", "0.032"]
    )
    axes.set_xlabel("learning rate of the matrices")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["quick", "full"])
    name = parser.parse_args().name
    out = ROOT.parent / "docs" / "figures" / "pretrain.png"
    out.parent.mkdir(exist_ok=True)
    draw(curves(ROOT / "results" / f"pretrain-{name}.jsonl")).savefig(out, dpi=144)
    print(out.relative_to(ROOT.parent))


if __name__ == "__main__":
    main()
