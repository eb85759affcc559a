"""Does the best learning rate of RiemannianMuon stay put when the rank changes?

    python benchmarks/lr_transfer.py      # about 20 minutes on 2 cores

The quick task of benchmarks/pretrain.py at width 192, where every layer is low-rank at r = 8, 16, 32 and 64; grid of
ratio √2, grown until the optimum is inside it; one seed, then three at the best rate and its neighbours. Ends with one
JSON line.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import language_model as lm
import torch
from pretrain import QUICK
from protocol import Run, Store, environment, geometric, sweep, table

from lowrank_geo import lowrank_layers

TASK = QUICK._replace(width=192, hidden=512, heads=6)
RANKS = (8, 16, 32, 64)


def compute(rank: int, metric: str, run: Run) -> dict[str, Any]:
    model = lm.lowrank(TASK, run.seed, rank)
    # A layer left dense would have an optimum of its own.
    assert len(list(lowrank_layers(model))) == 7 * TASK.layers
    optimizers = lm.riemannian_muon(model, run.lr, metric=metric)
    return lm.train(model, optimizers, TASK, run.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--metric", choices=["product", "embedded"], default="embedded")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    metric = arguments.metric
    store = Store(Path(__file__).parent / "results" / f"lr-transfer-{metric}.jsonl")
    grid = geometric(7.07e-3, 2**0.5, 4)
    rows = [
        sweep(store, f"r = {rank}", grid, partial(compute, rank, metric))
        for rank in arguments.ranks
    ]
    header = ["rank", "best lr", "loss, nats/byte"]
    cells = [[r.method, f"{r.lr:.3g}", f"{r.loss:.3f} ± {r.spread:.3f}"] for r in rows]
    print(table(header, cells))
    best = [r.lr for r in rows]
    print(f"largest over smallest best lr: {max(best) / min(best):.2f}")
    record = {"benchmark": f"lr-transfer-{metric}", "task": TASK._asdict(), "best": best}
    print(json.dumps({**record, "rows": cells, **environment()}))


if __name__ == "__main__":
    main()
