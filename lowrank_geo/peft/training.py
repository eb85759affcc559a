"""Adapters in Hugging Face's Trainer: its optimizer, and what to log."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowrank_geo.diagnostics import singular_values
from lowrank_geo.layers import LowRankLayer
from lowrank_geo.optim import OPTIMIZERS, param_groups
from lowrank_geo.peft.layer import FixedRankLayer

# Trained as a whole and new to the model: at the rate of embeddings and heads, not of matrices.
WHOLE = ("lm_head", "embed", "modules_to_save")


def optimizer_for(
    model: nn.Module,
    name: str = "muon",
    *,
    lr: float | None = None,
    euclidean_lr: float | None = None,
    weight_decay: float = 0.0,
    total_steps: int | None = None,
) -> tuple[type[Optimizer], dict[str, Any]]:
    """The optimizer called `name` for `Trainer(optimizer_cls_and_kwargs=...)`, with whole triples in its groups.

    The Trainer's own lists of decayed and undecayed parameters would tear U, S and V apart. Its learning rate and
    weight decay are not read: those given here are, and its schedule multiplies them.

    Args: lr: of the adapters. euclidean_lr: of modules that are saved as a whole, and of biases. None for the
        defaults of the method. total_steps: length of the run, for "fsgdm".
    Raises: ValueError for an unknown name, for Polyak steps, which need the loss, and for a model in which nothing is
        trained.
    """
    if name not in OPTIMIZERS:
        names = ", ".join(sorted(OPTIMIZERS))
        raise ValueError(f"optimizer_for needs one of {names}, got {name!r}; use one of them")
    if "polyak" in name:
        raise ValueError(
            f"optimizer_for needs an optimizer that steps without the loss, got {name!r}, and the Trainer passes none; "
            "use 'schedule-free-adam'"
        )
    named = OPTIMIZERS[name]
    groups = param_groups(
        model,
        lr=named.lr if lr is None else lr,
        euclidean_lr=named.euclidean_lr if euclidean_lr is None else euclidean_lr,
        weight_decay=weight_decay,
        dense=WHOLE,
        gradient=named.gradient,
    )
    if not groups:
        raise ValueError(
            "optimizer_for needs a model with parameters to train, got none; wrap it with get_peft_model first"
        )

    return class_for(name, lambda params: named.make(params, total_steps)), {"params": groups}


def class_for(name: str, build: Callable[[Any], Optimizer]) -> type[Optimizer]:
    """A class whose call is `build`: what is no class of optimizers, the Trainer takes for its own factory."""

    def new(cls: type, params: Any) -> Optimizer:
        return build(params)

    return type(name, (Optimizer,), {"__new__": new})


class RankCallback(TrainerCallback):
    """Adds to every log of the Trainer how large the changes are and how many ranks they use.

    `adapter_norm` is |ΔW| over all layers, `adapter_rank` the mean over layers of the effective rank (|σ|₁/|σ|₂)²,
    between 1 and r, and 0 for ΔW = 0. With `layers=True` each layer's own follow, by name.

    Source: effective rank, Rudelson & Vershynin's numerical rank in the form of (trace norm / Frobenius norm)².
    """

    def __init__(self, *, layers: bool = False) -> None:
        self.layers = layers

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        found = {} if model is None else sizes_of_changes(model, layers=self.layers)
        if logs is not None:
            logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)


@torch.no_grad()
def sizes_of_changes(model: nn.Module, *, layers: bool = False) -> dict[str, float]:
    """|ΔW| and effective ranks of the active adapters; see `RankCallback`."""
    cores = {}
    for name, module in model.named_modules():
        if not isinstance(module, FixedRankLayer):
            continue
        for adapter in module.active_adapters:
            for index, triple in enumerate(module.triples(adapter)):
                cores[f"{name}.{index}"] = module.fixed_rank_scale[adapter] * core_of(triple)
    if not cores:
        return {}
    spectra = singular_values(cores)
    sizes = {name: float(s.norm()) for name, s in spectra.items()}
    ranks = {
        name: float((s.sum() / s.norm()) ** 2) if sizes[name] > 0 else 0.0
        for name, s in spectra.items()
    }
    total = sum(size**2 for size in sizes.values()) ** 0.5
    found = {"adapter_norm": total, "adapter_rank": sum(ranks.values()) / len(ranks)}
    if layers:
        found |= {f"adapter_rank/{name}": rank for name, rank in ranks.items()}
    return found


@torch.no_grad()
def core_of(triple: LowRankLayer) -> torch.Tensor:
    """S as it is with orthonormal frames, whose singular values are those of U S Vᵀ.

    Shapes: -> (r, r).
    """
    R_u = torch.linalg.qr(triple.U)[1]
    R_v = torch.linalg.qr(triple.V)[1]
    return R_u @ triple.S @ R_v.mT
