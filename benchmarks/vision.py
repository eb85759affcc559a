"""Part d of optimizers.py: VGG-16 and a ViT with 25 % and 5.65 % of their parameters, ours and dynamical low-rank ones.

    python benchmarks/optimizers.py d                    # scikit-learn's digits, about 6 hours on one core
    python benchmarks/optimizers.py d --quick            # ViT, two epochs; VGG-16, one, three optimizers: an hour
    python benchmarks/optimizers.py d --images FOLDER    # e.g. CIFAR-10: FOLDER/train/CLASS/*.png, FOLDER/test/...

Fixed-rank rows get their ranks from `plan_ranks(budget=...)`. Dynamical low-rank training chooses them itself, by its
tolerance, below the ranks of twice that budget, and its table shows what it arrived at. 5.65 % is the compression of
the published tables. A row's parameters are counted after training.
Source: Schotthöfer et al., A geometric framework for momentum-based optimizers for low-rank training, arXiv 2506.17475.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from protocol import Run, Store, geometric, sweep
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lowrank_geo import convert, lowrank_layers, optim
from lowrank_geo.models.vgg import VGG, VGGConfig
from lowrank_geo.models.vit import ViT, ViTConfig
from lowrank_geo.optim import schedules

SIDE, BATCH = 32, 32
BUDGETS = (0.0565, 0.25)
FIRST = {"muon": 5e-3, "adam": 2.5e-3, "sgd": 0.025, "dlrt-adam": 2.5e-3, "dlrt-heavy-ball": 0.025}


class Images(NamedTuple):
    """Images (B, channels, SIDE, SIDE) of mean 0 and variance 1 and their classes (B,)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


@cache
def digits() -> Images:
    source = load_digits()
    x = torch.tensor(source.images, dtype=torch.float32)[:, None]
    x = F.interpolate((x - x.mean()) / x.std(), size=SIDE, mode="bilinear", align_corners=False)
    y = torch.tensor(source.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return Images((x[train], y[train]), (x[test], y[test]), 10)


@cache
def folder(path: Path) -> Images:
    """Folders train/ and test/ of one folder a class.

    Raises: SystemExit naming the folder if one is missing or empty.
    """
    classes = sorted(p.name for p in (path / "train").glob("*") if p.is_dir())
    if not classes:
        raise SystemExit(f"--images needs {path}/train/CLASS/*.png, found no class there")

    def read(part: str) -> tuple[Tensor, Tensor]:
        files = [(f, i) for i, c in enumerate(classes) for f in sorted((path / part / c).glob("*"))]
        if not files:
            raise SystemExit(f"--images needs {path}/{part}/CLASS/*.png, found no image there")
        pixels = [np.asarray(Image.open(f).convert("RGB").resize((SIDE, SIDE))) for f, _ in files]
        x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        return (x - 0.5) / 0.25, torch.tensor([i for _, i in files])

    return Images(read("train"), read("test"), len(classes))


def vgg(data: Images) -> nn.Module:
    channels = data.train[0].shape[1]
    config = VGGConfig(16, data.classes, channels, batch_norm=True, pool=1, hidden=512, dropout=0.0)
    return VGG(config)


def vit(data: Images) -> nn.Module:
    channels = data.train[0].shape[1]
    return ViT(ViTConfig(SIDE, 8, channels, data.classes))


class Plan(NamedTuple):
    """How long a model is trained, and with what."""

    epochs: int
    optimizers: tuple[str, ...] = tuple(FIRST)


MODELS: dict[str, Callable[[Images], nn.Module]] = {"ViT": vit, "VGG-16": vgg}
FULL = {"ViT": Plan(6), "VGG-16": Plan(6)}
QUICK = {"ViT": Plan(2), "VGG-16": Plan(1, ("muon", "adam", "dlrt-adam"))}


def used(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Parameters of the matrices at the ranks in use, U, S and V, and all others."""
    layers = [layer for _, layer in lowrank_layers(model)]
    full = sum(p.numel() for p in model.parameters())
    for layer in layers:
        (m, r), n = layer.U.shape, layer.V.shape[0]
        rank = int(optimizer.state.get(layer.S, {}).get("rank", r))
        full -= (m + n + r) * r - (m + n + rank) * rank
    return full


def compute(
    name: str,
    build: Callable[[Images], nn.Module],
    budget: float,
    data: Images,
    epochs: int,
    run: Run,
) -> dict[str, Any]:
    torch.manual_seed(run.seed)
    model = build(data)
    dense = sum(p.numel() for p in model.parameters())
    # Room for the ranks to grow; twice the budget is what augmentation may use at its peak.
    room = 2.0 if name.startswith("dlrt") else 1.0
    model = convert(model, budget=min(1.0, room * budget), init="spectral")
    (x, y), steps = data.train, epochs * (len(data.train[0]) // BATCH)
    optimizer = optim.build(name, model, lr=run.lr, euclidean_lr=2e-3, total_steps=steps)
    schedule = schedules.cosine(optimizer, steps, warmup=0.1)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    if isinstance(optimizer, optim.AugmentedAdam | optim.AugmentedHeavyBall):
        optimizer.truncate()
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(part) for part in data.test[0].split(256)])
    return {
        "loss": F.cross_entropy(scores, data.test[1]).item(),
        "error": (scores.argmax(1) != data.test[1]).float().mean().item(),
        "share": used(model, optimizer) / dense,
    }


def rows(
    store: Store, images: Path | None = None, *, quick: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    data = digits() if images is None else folder(images)
    label = "digits" if images is None else images.name
    found = []
    for model, (epochs, names) in (QUICK if quick else FULL).items():
        for budget in BUDGETS:
            for name in names:
                key = f"{label} | {model} | {epochs} epoch(s) | {budget:.2%} | {name}"
                run = partial(compute, name, MODELS[model], budget, data, epochs)
                row = sweep(store, key, geometric(FIRST[name], 2.0, 3), run)
                records = [r for k, r in store.records.items() if (k.method, k.lr) == (key, row.lr)]
                error, share = (
                    sum(r[k] for r in records) / len(records) for k in ("error", "share")
                )
                loss = f"{row.loss:.3f} ± {row.spread:.3f}"
                cells = [f"{error:.2%}", f"{share:.2%}", f"{row.lr:.3g}", f"{row.window:.1f}"]
                found.append([model, f"{budget:.2%}", name, loss, *cells])
    header = [
        "model",
        "budget",
        "optimizer",
        "test loss",
        "test error",
        "parameters",
        "best lr",
        "lr window",
    ]
    return header, found
