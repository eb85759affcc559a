"""Runs on images for the tests: tiny networks on folders that the tests write."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from image_files import blob, noisy, write_png

from lowrank_geo.train import checkpoint

SMALL: dict[str, Any] = {
    "size": 16, "width": 4, "depth": 2, "blocks": 1, "epochs": 3, "batch": 4, "lr": 1e-2, "device": "cpu",
}  # fmt: skip
FLAGS = [part for name, value in SMALL.items() for part in ("--" + name, str(value))]
TIMED = ("seconds", "images_per_second", "milliseconds_per_image")


def pairs(root: Path, count: int = 12, size: int = 16) -> Path:
    """Images and masks of discs."""
    for number in range(count):
        mask = blob(size, shift=number % 5 - 2)
        write_png(root / "images" / f"case{number:02d}.png", noisy(mask, number))
        write_png(root / "masks" / f"case{number:02d}.png", mask * 255)
    return root


def by_class(root: Path, count: int = 6, names: tuple[str, str] = ("dark", "light")) -> Path:
    """Class folders of dark and light pictures."""
    for label, name in enumerate(names):
        for number in range(count):
            picture = noisy(blob(16), 100 * label + number) // (2 - label)
            write_png(root / name / f"{name}{number}.png", picture.astype(np.uint8))
    return root


def last_bits(run: Path) -> tuple[str, list[bytes]]:
    """The newest checkpoint, every bit of its tensors."""
    path = checkpoint.steps(run / "checkpoints")[0]
    return path.name, [(path / file).read_bytes() for file in checkpoint.FILES]


def measured(run: Path) -> list[dict[str, Any]]:
    """What a run recorded, but for times; an end that came twice counts once."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]
