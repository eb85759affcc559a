"""The optimizer family: where each method wins and where it loses.

    python benchmarks/optimizers.py a b e cost   # minutes; a: half an hour
    python benchmarks/optimizers.py c d          # hours

Parts: a, a quadratic on matrices of rank 5; b, a quadratic of heterogeneous blocks; c, the small language model; d,
VGG-16 and a ViT on images; e, a survey's five methods on digits and diabetes; cost, a step against torch's AdamW. Runs
are kept in results/ and skipped; each part prints a table and one JSON line.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import family
import heterogeneous
import quadratic
import survey
import torch
import vision
from protocol import Store, environment, table

Part = Callable[..., tuple[list[str], list[list[str]]]]
PARTS: dict[str, Part] = {
    "a": quadratic.rows,
    "b": heterogeneous.rows,
    "c": family.rows,
    "d": vision.rows,
    "e": survey.rows,
    "cost": lambda store: family.step_costs(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=Path, help="part d: a folder of train/CLASS, test/CLASS")
    parser.add_argument("--quick", action="store_true", help="part d: fewer epochs and optimizers")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="part c: these rows, by name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for part in arguments.parts:
        store = Store(Path(__file__).parent / "results" / f"optimizers-{part}.jsonl")
        more = {
            "d": {"images": arguments.images, "quick": arguments.quick},
            "c": {"only": arguments.only},
        }
        header, rows = PARTS[part](store, **more.get(part, {}))
        print(table(header, rows))
        records = [dict(zip(header, row, strict=True)) for row in rows]
        print(json.dumps({"benchmark": f"optimizers-{part}", "rows": records, **environment()}))


if __name__ == "__main__":
    main()
