"""Optimizers of this package in Hugging Face's Trainer, and the ranks and spectra in its logs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from lowrank_geo.diagnostics import drift, singular_values
from lowrank_geo.geometry import Point
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.optim import param_groups
from lowrank_geo.optim.groups import points_of
from lowrank_geo.optim.named import optimizer_named

# Those of pre-training forget after 20 steps: worth it over thousands, and 0.03 to 0.04 nats lost over 60
# (docs/decisions.md).
BETAS = (0.9, 0.999)
# Of the rate in pre-training, which weights of unit scale need and a change of trained weights does not; measured for
# "muon", "muon-product", "qhadam" and "adam" on the demo's encoder (docs/decisions.md).
SHARE, BOUNDED_SHARE, SHARES = 0.25, 0.5, {"muon-product": 2.0}
RANK = 16  # at which a rate that falls as 1/r is the one that is given; measured from 4 to 32 (docs/decisions.md)
# Of Adam's directions, which have one of 1 in the first step of a new adapter and of 0.3 later on (docs/decisions.md).
MAX_RMS = 0.2
# Of a step along the gradient at the peak of the schedule: best rates of "qhadam" have 0.2 to 0.4 (docs/decisions.md).
MAX_ADVANCE = 0.3
HEADS = ("lm_head", "embed", "classifier", "score", "pooler", "modules_to_save")


def default_rate(name: str, max_rms: float | None = MAX_RMS) -> float:
    """The learning rate of adapters with the optimizer `name` and this bound, where none is given.

    Raises: ValueError for an unknown name.
    """
    named = optimizer_named(name)
    bounded = named.bounded and max_rms is not None
    return SHARES.get(name, BOUNDED_SHARE if bounded else SHARE) * named.lr


def optimizer_for(
    model: nn.Module,
    name: str = "qhadam",
    *,
    lr: float | None = None,
    euclidean_lr: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = BETAS,
    max_rms: float | None = MAX_RMS,
    max_advance: float | None = MAX_ADVANCE,
    total_steps: int | None = None,
) -> tuple[type[Optimizer], dict[str, Any]]:
    """What Trainer takes as `optimizer_cls_and_kwargs`: the optimizer `name` on the trained parameters of a model.

    Trainer's own groups, decayed and not, would tear triples apart. Rates and weight decay are these here, those of
    the training arguments are not read; the schedule is. New heads and other saved modules are Euclidean.

    One `lr` serves all ranks: that of Adam and its relatives is the one at r = 16, and triples of another rank have
    lr · 16/r. Rows of their direction have mean square 1 whatever the rank, and r of them change an output together.

    Args: name: one of `lowrank_geo.optim.OPTIMIZERS`. lr: of the adapters; None for a quarter of the rate in
        pre-training, half of it with a bound, for "muon-product" twice the rate. euclidean_lr: of the rest; None for
        the method's own. betas: of Adam's moments, in new heads also of "muon"; methods that are defined by theirs,
        "adavar" say, keep them. max_rms: the bound, a largest root mean square of the adapters' directions with "adam",
        "adam-core", "adam-scalar" and "qhadam"; None for any. Heads and other methods have none. max_advance: longest
        way along the gradient of a step of all adapters together with "qhadam", which is what a too large `lr` comes
        to; None for any. total_steps: of the run, for "fsgdm".
    Raises: ValueError for an unknown name, a model without trained parameters, and Polyak's step sizes, which need the
        loss that Trainer keeps to itself.
    """
    named = optimizer_named(name)
    if name.endswith("-polyak"):
        raise ValueError(
            f"optimizer_for needs an optimizer that steps without the loss, got {name!r}; Trainer does not pass it on, "
            "train with your own loop"
        )
    groups = param_groups(
        model,
        lr=default_rate(name, max_rms) if lr is None else lr,
        euclidean_lr=named.euclidean_lr if euclidean_lr is None else euclidean_lr,
        weight_decay=weight_decay,
        dense=HEADS,
        gradient=named.gradient,
    )
    if named.per_rank:
        groups = [part for group in groups for part in by_rank(group)]
    if named.takes_betas:
        groups = [{**group, "betas": betas} for group in groups]
    bounds = {"max_rms": max_rms} if named.bounded else {}
    bounds |= {"max_advance": max_advance} if named.advances else {}
    groups = [{**g, **bounds} if g["geometry"] == "fixed_rank" else g for g in groups]
    if not groups:
        raise ValueError(
            "optimizer_for needs a model with trained parameters, got none; load the adapter with is_trainable=True"
        )

    def make(cls: type, params: list[dict[str, Any]], **settings: Any) -> Optimizer:
        return named.make(params, total_steps)

    # Trainer tells optimizers from factories by their being classes; what this class makes is the optimizer itself.
    return type(f"Trainer[{name}]", (Optimizer,), {"__new__": make}), {"params": groups}


def by_rank(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of triples as one for each rank r, with lr · 16/r; any other group as it is."""
    if group["geometry"] != "fixed_rank":
        return [group]
    members: dict[int, list[tuple[str, Point]]] = {}
    for name, point in zip(group["layers"], points_of(group), strict=True):
        members.setdefault(point.S.shape[-1], []).append((name, point))
    return [
        {
            **group,
            "params": [p for _, point in found for p in point],
            "layers": [name for name, _ in found],
            "lr": group["lr"] * RANK / r,
        }
        for r, found in members.items()
    ]


class RankCallback(TrainerCallback):
    """Adds to each log of Trainer what the adapters' spectra say; whole spectra are kept in `history`.

    rank/stable: |S|_F² / |S|₂², the mean over layers. rank/largest, rank/smallest: extreme singular values of ΔW over
    layers. rank/drift: the largest entry of |UᵀU − I| and |VᵀV − I|. Waits for the device, at logs only.

    Args: every: logs between two records.
    """

    def __init__(self, *, every: int = 1) -> None:
        self.every, self.count = every, 0
        self.history: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer; loss and rate are in the same line."""
        logs, model = kwargs.get("logs"), kwargs.get("model")
        self.count += 1
        if logs is None or model is None or (self.count - 1) % self.every:
            return
        trained = trained_layers(model)
        if not trained:
            return
        spectra = singular_values({key: layer.S.detach() for key, layer in trained.items()})
        found = summary(spectra) | {"rank/drift": deviation(trained)}
        self.history.append({"step": state.global_step, "spectra": spectra, **found})
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)


def trained_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The low-rank layers that are trained, by name."""
    return {key: layer for key, layer in lowrank_layers(model) if layer.S.requires_grad}


def summary(spectra: dict[str, Tensor]) -> dict[str, float]:
    """Mean stable rank and extreme singular values.

    Shapes: each (r), descending.
    """
    squares = [(s.square().sum(), s[0].square()) for s in spectra.values()]
    stable = [float(total / top) if top > 0 else 0.0 for total, top in squares]
    return {
        "rank/stable": sum(stable) / len(stable),
        "rank/largest": max(float(s[0]) for s in spectra.values()),
        "rank/smallest": min(float(s[-1]) for s in spectra.values()),
    }


def deviation(trained: dict[str, LowRankLayer]) -> float:
    """The largest drift of a frame."""
    return float(torch.stack([drift((x.U, x.V)).cpu() for x in trained.values()]).max())
