"""What each setting of RiemannianMuon is worth alone, with one seed: the screening behind its defaults.

    python benchmarks/levers.py      # about 15 minutes on 2 cores

The quick task of benchmarks/pretrain.py, twice as long. One seed and one change at a time: differences below 0.03, the
spread between seeds, say nothing. Ends with one JSON line.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import language_model as lm
import torch
from pretrain import QUICK
from protocol import Run, Store, environment, table

TASK = QUICK._replace(steps=400)
RANK = TASK.width // 6


class Lever(NamedTuple):
    """One change against the defaults."""

    name: str
    lr: float = 0.01
    init: str = "spectral"
    settings: dict[str, Any] = {}


LEVERS = [
    Lever("defaults"),
    Lever("spectrum 2", settings={"spectrum": 2.0}),
    Lever("spectrum 4", settings={"spectrum": 4.0}),
    Lever("rotation 0.25", settings={"rotation": 0.25}),
    Lever("rotation 0.25, spectrum 2", settings={"rotation": 0.25, "spectrum": 2.0}),
    Lever("orthogonal start", init="orthogonal"),
    Lever("lr 0.005", lr=0.005),
    Lever("lr 0.02", lr=0.02),
    Lever("lr 0.04", lr=0.04),
]


def compute(lever: Lever, run: Run) -> dict[str, Any]:
    model = lm.lowrank(TASK, run.seed, RANK, lever.init)
    optimizers = lm.riemannian_muon(model, run.lr, metric="product", **lever.settings)
    return lm.train(model, optimizers, TASK, run.seed)


def two_factors(run: Run) -> dict[str, Any]:
    model = lm.factors(TASK, run.seed, RANK)
    return lm.train(model, lm.muon(model, run.lr), TASK, run.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    store = Store(Path(__file__).parent / "results" / "levers.jsonl")
    losses = {
        lever.name: store.get(Run(lever.name, lever.lr, 0), partial(compute, lever))["loss"]
        for lever in LEVERS
    }
    for lr in (0.005, 0.01, 0.02):
        name = f"two factors, Muon, lr {lr:g}"
        losses[name] = store.get(Run(name, lr, 0), two_factors)["loss"]
    rows = [[name, f"{loss:.3f}"] for name, loss in losses.items()]
    print(table(["change", "loss, nats/byte"], rows))
    print(json.dumps({"benchmark": "levers", "rows": rows, **environment()}))


if __name__ == "__main__":
    main()
