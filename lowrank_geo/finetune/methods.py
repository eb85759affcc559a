"""Ways to fine-tune: which parameters are trained, and with which optimizer. New heads train beside all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from lowrank_geo.finetune.config import FinetuneConfig
from lowrank_geo.optim import LoRAPreconditioned
from lowrank_geo.peft import FixedRankConfig, optimizer_for
from lowrank_geo.peft.training import BETAS, default_rate

Wrap = Callable[[nn.Module, FinetuneConfig, str], nn.Module]
Make = Callable[[nn.Module, FinetuneConfig, float], Optimizer]


class Method(NamedTuple):
    """How a model is wrapped and trained, and its learning rate if the config names none."""

    wrap: Wrap
    make: Make
    lr: float | None  # None: that of the optimizer

    def rate(self, config: FinetuneConfig) -> float:
        """The learning rate of a run.

        Raises: ValueError for an optimizer that is asked for its own and unknown.
        """
        if config.lr is not None:
            return config.lr
        if self.lr is not None:
            return self.lr
        return default_rate(config.optimizer)


def fixed_rank(model: nn.Module, config: FinetuneConfig, task: str) -> nn.Module:
    return get_peft_model(
        model, FixedRankConfig(r=config.r, target_modules=config.target_modules, task_type=task)
    )


def lora(**settings: Any) -> Wrap:
    """LoRA with alpha = r, or with what `settings` say."""

    def wrap(model: nn.Module, config: FinetuneConfig, task: str) -> nn.Module:
        common = dict(
            r=config.r, lora_alpha=config.r, target_modules=config.target_modules, task_type=task
        )
        return get_peft_model(model, LoraConfig(**common | settings))

    return wrap


def adalora(model: nn.Module, config: FinetuneConfig, task: str) -> nn.Module:
    """AdaLoRA that starts at 3/2 of the rank and prunes to it over the middle of the run."""
    settings = AdaLoraConfig(
        init_r=max(config.r * 3 // 2, config.r + 1),
        target_r=config.r,
        lora_alpha=config.r,
        tinit=config.steps // 10,
        tfinal=config.steps // 2,
        deltaT=max(1, config.steps // 50),
        total_step=config.steps,
        target_modules=config.target_modules,
        task_type=task,
    )
    return get_peft_model(model, settings)


def untouched(model: nn.Module, config: FinetuneConfig, task: str) -> nn.Module:
    return model


def ours(model: nn.Module, config: FinetuneConfig, lr: float) -> Optimizer:
    make, settings = optimizer_for(
        model, config.optimizer, lr=lr, euclidean_lr=config.euclidean_lr, total_steps=config.steps
    )
    return make(**settings)


def with_head(model: nn.Module, config: FinetuneConfig, lr: float) -> list[dict[str, Any]]:
    """Groups of two: the adapters with their rate, and modules that are new with that of the head."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    is_new = {n: "modules_to_save" in n or n.startswith("classifier") for n, _ in named}
    groups = [
        {"params": [p for n, p in named if not is_new[n]], "lr": lr},
        {"params": [p for n, p in named if is_new[n]], "lr": config.euclidean_lr},
    ]
    return [g for g in groups if g["params"]]


def adamw(model: nn.Module, config: FinetuneConfig, lr: float) -> Optimizer:
    return torch.optim.AdamW(with_head(model, config, lr), weight_decay=0.0)


def manifold(model: nn.Module, config: FinetuneConfig, lr: float) -> Optimizer:
    return LoRAPreconditioned(model, lr=lr, euclidean_lr=config.euclidean_lr, betas=BETAS)


def preconditioned(model: Any, config: FinetuneConfig, lr: float) -> Optimizer:
    """PEFT's own preconditioner around AdamW, which makes one group: new modules get one of their own here."""
    from peft.optimizers import create_riemannian_optimizer

    wrapped: Any = model
    optimizer = create_riemannian_optimizer(wrapped, torch.optim.AdamW, lr=lr, weight_decay=0.0)
    optimizer.param_groups.clear()
    for group in with_head(model, config, lr):
        optimizer.add_param_group(group)
    return optimizer


METHODS: dict[str, Method] = {
    "fixed-rank": Method(fixed_rank, ours, None),
    "lora": Method(lora(), adamw, 2e-3),
    "lora-manifold": Method(lora(), manifold, 2.5e-3),
    "lora-riemannian": Method(lora(), preconditioned, 2e-3),
    "rslora": Method(lora(use_rslora=True), adamw, 1e-3),
    "dora": Method(lora(use_dora=True), adamw, 2e-3),
    "pissa": Method(lora(init_lora_weights="pissa"), adamw, 1e-3),
    "adalora": Method(adalora, adamw, 4e-3),
    "full": Method(untouched, adamw, 1e-4),
}


def method_named(name: str) -> Method:
    """The method called `name`.

    Raises: ValueError for an unknown name.
    """
    if name not in METHODS:
        raise ValueError(
            f"method needs to be one of {', '.join(METHODS)}, got {name!r}; use one of them"
        )
    return METHODS[name]


class Allocation(TrainerCallback):
    """Calls AdaLoRA's pruning, which Trainer does not know of; on other models it does nothing."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer while the gradients, from which importance is measured, are there."""
        allocate = getattr(
            getattr(kwargs["model"], "base_model", None), "update_and_allocate", None
        )
        if allocate is not None:
            allocate(state.global_step)
