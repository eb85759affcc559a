"""The folder of a finished run."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_geo.peft import export_lora


def check_empty(out: Path) -> None:
    """Raise ValueError unless `out` is an empty folder or not there yet."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"finetune needs an empty folder for --out, got {out}; name another")


def save(
    model: Any,
    tokenizer: Any,
    out: Path,
    method: str,
    result: dict[str, Any],
    logs: list[dict[str, Any]],
) -> None:
    """Write the adapter, the same as plain LoRA, the tokenizer, and what was measured."""
    model.save_pretrained(out / "adapter")
    tokenizer.save_pretrained(out / "adapter")
    if method == "fixed-rank":
        export_lora(model, out / "lora")
    (out / "result.json").write_text(json.dumps(plain(result), indent=2) + "\n")
    (out / "log.jsonl").write_text("".join(json.dumps(plain(line)) + "\n" for line in logs))


def plain(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the log in numbers that JSON has."""
    found = {
        key: value.item() if isinstance(value, Tensor) else value for key, value in line.items()
    }
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()
    }
