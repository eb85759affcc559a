"""The optimizer family: where each method wins and where it loses.

    python benchmarks/optimizers.py b e cost     # minutes
    python benchmarks/optimizers.py c            # about 5 hours on 2 cores: 18 methods

Parts: b, a quadratic of heterogeneous blocks; c, the small language model; e, a survey's five methods on digits and
diabetes; cost, a step against torch's AdamW. Runs are kept in results/ and skipped; each part prints a table and one
JSON line.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import family
import heterogeneous
import survey
import torch
from protocol import Store, environment, table

Part = Callable[[Store], tuple[list[str], list[list[str]]]]
PARTS: dict[str, Part] = {
    "b": heterogeneous.rows,
    "c": family.rows,
    "e": survey.rows,
    "cost": lambda store: family.step_costs(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for part in arguments.parts:
        store = Store(Path(__file__).parent / "results" / f"optimizers-{part}.jsonl")
        header, rows = PARTS[part](store)
        print(table(header, rows))
        records = [dict(zip(header, row, strict=True)) for row in rows]
        print(json.dumps({"benchmark": f"optimizers-{part}", "rows": records, **environment()}))


if __name__ == "__main__":
    main()
