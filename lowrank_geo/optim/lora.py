"""Steps on the manifold for plain LoRA adapters, whose parameters are two factors B and A."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_geo import guard
from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.checks import check_is_state, check_state
from lowrank_geo.optim.copies import attributes
from lowrank_geo.optim.groups import by_shape
from lowrank_geo.optim.lora_gradients import give_gradients
from lowrank_geo.optim.lora_pairs import Pair, lora_pairs, write, written
from lowrank_geo.optim.muon import RiemannianMuon

RATES = ("lr", "weight_decay")
PEAKS = ("initial_lr", "max_lr")  # what schedulers write into groups


class LoRAPreconditioned(Optimizer):
    """An optimizer of this package on the LoRA adapters of a model, batched by shape; no new kind of adapter.

    From the start A has orthonormal rows and B is what is left, which is the same B A. Point and state are kept in
    float32 or better, so adapters in bfloat16 lose no small steps. What is trained and no pair of matrices is
    Euclidean.

    Args: optimizer_cls: a `RiemannianOptimizer`, or what makes one of parameter groups. damping: of S, relative to its
        root mean square. settings: of the optimizer.
    Raises: ValueError for a model without trained pairs, and for DoRA, whose weight is no B A; TypeError for
        optimizers of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_cls: Callable[..., RiemannianOptimizer] = RiemannianMuon,
        *,
        lr: float | Tensor,
        euclidean_lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        **settings: Any,
    ) -> None:
        self.pairs = [written(pair) for pair in lora_pairs(model)]
        if not self.pairs:
            raise ValueError(
                "LoRAPreconditioned needs a model with trained lora_A and lora_B matrices, got none; wrap it with "
                "peft.get_peft_model and a LoraConfig"
            )
        self.damping = damping
        factors = [p for pair in self.pairs for p in (pair.B, pair.A)]
        known = {id(p) for p in factors}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        points = [x for pair in self.pairs for x in pair.point]
        guard.mark(points)
        groups: list[dict[str, Any]] = [{"params": points, "geometry": "fixed_rank"}]
        groups += [{"params": rest, "geometry": "euclidean"}] if rest else []
        rates = {} if euclidean_lr is None else {"euclidean_lr": euclidean_lr}
        self.inner = optimizer_cls(groups, lr=lr, weight_decay=weight_decay, **rates, **settings)
        if not isinstance(self.inner, RiemannianOptimizer):
            raise TypeError(
                f"LoRAPreconditioned needs an optimizer of lowrank_geo.optim, got {type(self.inner).__name__}; use "
                "e.g. RiemannianMuon"
            )
        shown = [{"params": factors}] + ([{"params": rest}] if rest else [])
        for group, inner in zip(shown, self.inner.param_groups, strict=True):
            group.update({key: inner[key] for key in RATES})
        super().__init__(shown, {})
        self._show_state()

    def __getstate__(self) -> dict[str, Any]:
        return attributes(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._show_state()  # a copied parameter no longer shares memory with what shows it

    def _show_state(self) -> None:
        """Let the state of the factors be that of their point: the same tensors, changed in place."""
        for pair in self.pairs:
            for owner, names in ((pair.B, "US"), (pair.A, "V")):
                for name in names:
                    part = getattr(pair.point, name)
                    self.state[owner][name] = part.detach()
                    for key, value in self.inner.state[part].items():
                        self.state[owner][f"{name}_{key}"] = value
        for group in self.param_groups[1:]:
            for parameter in group["params"]:
                self.state[parameter] = self.inner.state[parameter]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: group[key] for key in (*RATES, *PEAKS) if key in group})
        for bucket in self._buckets():
            give_gradients(bucket, self.damping)
        self.inner.step()
        for pair in self.pairs:
            write(pair)
            for part in pair.point:
                part.grad = None
        return loss

    def _buckets(self) -> Iterator[list[Pair]]:
        """The pairs with gradients, by shape."""
        active = {
            id(p.point): p for p in self.pairs if p.A.grad is not None and p.B.grad is not None
        }
        for points in by_shape([pair.point for pair in active.values()]):
            yield [active[id(point)] for point in points]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer; the factors become those of the saved point.

        Raises: ValueError if the state is of other ranks or layers; then nothing is changed.
        """
        call = "LoRAPreconditioned.load_state_dict"
        check_is_state(call, state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        if len(params) != len(keys):
            raise ValueError(
                f"{call} needs the state of {len(params)} parameters, got that of {len(keys)}; load a state saved with "
                "the same layers"
            )
        states = [
            (self.state[parameter], state_dict["state"].get(key, {}))
            for parameter, key in zip(params, keys, strict=True)
        ]
        for mine, saved in states:
            check_state(call, mine, saved)
        for mine, saved in states:
            for name, value in mine.items():
                value.copy_(saved[name])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for pair in self.pairs:
            write(pair)
