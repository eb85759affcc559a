"""The optimizer class: fetches points, gradients and state, calls the pure step, stores the
result.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_geo import guard
from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.optim import euclidean
from lowrank_geo.optim.groups import GEOMETRIES, check_gradient, counts, triples
from lowrank_geo.optim.step import Rule, Schedule, move


class RiemannianOptimizer(Optimizer):
    """What the optimizers of this package share; a concrete one names its rules.

    State is plain tensors beside each parameter, created with the group. Its momentum is always a
    tangent vector at the current point. Gradients are never written to.
    """

    reads_tangent_gradients = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        euclidean_lr: float | Tensor | None = None,
    ) -> None:
        self._euclidean_lr = defaults["lr"] if euclidean_lr is None else euclidean_lr
        self._transports: dict[int, Tensor] = {}
        super().__init__(params, {"geometry": "euclidean", **defaults})

    def rule(self, group: dict[str, Any]) -> Rule:
        """Metric, filter and direction for the triples of a fixed_rank group."""
        raise NotImplementedError

    def euclidean_directions(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Tensor]]
    ) -> list[Tensor]:
        """Directions of unit learning rate for the other parameters; updates their states in
        place.
        """
        raise NotImplementedError

    def euclidean_slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the element-wise states of a group that is not fixed_rank."""
        return ("momentum",)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with fresh state at once.

        Raises: ValueError if a triple is split, badly shaped, not orthonormal or in a group of
            the wrong geometry.
        """
        group = dict(param_group)
        geometry = group.setdefault("geometry", "euclidean")
        if geometry not in GEOMETRIES:
            raise ValueError(
                f"a parameter group needs geometry out of {', '.join(GEOMETRIES)}, got {geometry!r}; "
                "use lowrank_geo.param_groups"
            )
        if geometry == "euclidean":
            group.setdefault("lr", self._euclidean_lr)
        super().add_param_group(group)
        try:
            self._check_group(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        self._create_state(self.param_groups[-1])

    def _check_group(self, group: dict[str, Any]) -> None:
        check_rate("lr", group["lr"])
        check_rate("weight_decay", group["weight_decay"])
        fixed = group["geometry"] == "fixed_rank"
        for parameter in group["params"]:
            if fixed != guard.is_marked(parameter):
                shape = tuple(parameter.shape)
                raise ValueError(
                    f"a fixed_rank group needs layers with gradient='tangent', got a factor of shape {shape} "
                    "without; use lowrank_geo.param_groups"
                    if fixed
                    else f"a {group['geometry']} group needs ordinary gradients, got a factor of a low-rank "
                    f"layer, of shape {shape}; keep U, S, V together in a fixed_rank group, as "
                    "lowrank_geo.param_groups does"
                )
        if fixed:
            triples(group)
            self.rule(group)

    @torch.no_grad()
    def _create_state(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            kind = {"device": parameter.device, "dtype": torch.float32}
            self.state[parameter]["step"] = torch.zeros((), **kind)
        if group["geometry"] != "fixed_rank":
            for parameter in group["params"]:
                for name in self.euclidean_slots(group):
                    dtype = torch.promote_types(parameter.dtype, torch.float32)
                    self.state[parameter][name] = torch.zeros_like(parameter, dtype=dtype)
            return
        direction = self.rule(group).direction
        for point in (Point(*x) for x in zip(*[iter(group["params"])] * 3, strict=True)):
            fresh = {"momentum": Tangent(*(torch.zeros_like(p) for p in point))}
            for name, parts in {
                **fresh,
                **direction.slots(Point(*(p.detach() for p in point))),
            }.items():
                for parameter, part in zip(point, parts, strict=True):
                    self.state[parameter][name] = part

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["geometry"] == "fixed_rank":
                for points in self._buckets(group):
                    self._move(group, points)
            else:
                self._step_euclidean(group)
        return loss

    def _buckets(self, group: dict[str, Any]) -> Iterator[list[Point]]:
        """The triples with a gradient, by shape, dtype and device."""
        buckets: dict[Any, list[Point]] = {}
        for point in (Point(*x) for x in zip(*[iter(group["params"])] * 3, strict=True)):
            if point.S.grad is None:
                continue
            if not guard.is_marked(point.U):
                raise RuntimeError(
                    f"{type(self).__name__}.step needs layers with gradient='tangent', got a layer set to "
                    "'factors' after the optimizer was built; set layer.gradient = 'tangent'"
                )
            shapes = tuple(tuple(p.shape) for p in point)
            buckets.setdefault((shapes, point.S.dtype, point.S.device), []).append(point)
        return iter(buckets.values())

    def _move(self, group: dict[str, Any], points: list[Point]) -> None:
        columns = list(zip(*points, strict=True))  # all U, all S, all V
        rule, lr = self.rule(group), group["lr"]
        names = ("momentum", *rule.direction.slots(Point(*(c[0] for c in columns))))
        gradient = Tangent(*(stack([check_gradient(p) for p in column]) for column in columns))
        states = {
            name: Tangent(*(stack([self.state[p][name] for p in column]) for column in columns))
            for name in names
        }
        step = self._count(lr, points, gradient)
        moved = move(
            rule,
            Point(*(stack(column) for column in columns)),
            gradient,
            states.pop("momentum"),
            states,
            Schedule(step, lr, group["weight_decay"]),
        )
        for column, new in zip(columns, moved.point, strict=True):
            torch._foreach_copy_(list(column), list(new.unbind()))
        for name, parts in {"momentum": moved.momentum, **moved.slots}.items():
            for column, part in zip(columns, parts, strict=True):
                torch._foreach_copy_([self.state[p][name] for p in column], list(part.unbind()))
        for point, tau in zip(points, moved.transport.unbind(), strict=True):
            self._transports[id(point.S)] = tau

    def _count(self, lr: float | Tensor, points: list[Point], gradient: Tangent) -> Tensor:
        """Advance the counters; returns them, at least 1, for the bias corrections.

        Shapes: -> (L,).
        """
        active = counts(lr, [stack_flat(gradient, i) for i in range(len(points))])
        for column in zip(*points, strict=True):
            torch._foreach_add_(
                [self.state[p]["step"] for p in column], 1.0 if active is None else active
            )
        return torch.stack([self.state[point.S]["step"] for point in points]).clamp(min=1)

    def _step_euclidean(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        states = [self.state[p] for p in params]
        kinds = [torch.promote_types(p.dtype, torch.float32) for p in params]
        grads = [check_gradient(p).to(kind) for p, kind in zip(params, kinds, strict=True)]
        active = counts(group["lr"], grads)
        torch._foreach_add_([s["step"] for s in states], 1.0 if active is None else active)
        directions = self.euclidean_directions(group, grads, states)
        euclidean.decay(params, group["lr"], group["weight_decay"])
        euclidean.descend(params, directions, group["lr"])

    def transports(self) -> dict[str, float]:
        """τ = |Tm|/|m| of the last step by layer name: how much momentum survived the transport.

        Reads back to the host.
        """
        found = {}
        for group in self.param_groups:
            for name, S in zip(group.get("layers", ()), group["params"][1::3], strict=False):
                if id(S) in self._transports:
                    found[name] = float(self._transports[id(S)])
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer, but state keeps the dtype it was saved with.

        Raises: ValueError if a saved tensor does not have the shape of this optimizer's.
        """
        pairs = [
            (parameter, state_dict["state"].get(key, {}))
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
            for parameter, key in zip(group["params"], saved["params"], strict=False)
        ]
        for parameter, saved in pairs:
            for name, value in self.state[parameter].items():
                if name not in saved or saved[name].shape != value.shape:
                    got = tuple(saved[name].shape) if name in saved else "nothing"
                    raise ValueError(
                        f"{type(self).__name__}.load_state_dict needs {name} of shape {tuple(value.shape)}, "
                        f"got {got}; load a state saved with the same optimizer, ranks and layers"
                    )
        super().load_state_dict(state_dict)
        for parameter, saved in pairs:
            self.state[parameter] = {
                name: value.detach().to(parameter.device).clone() for name, value in saved.items()
            }


def stack(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """A batch of one without a copy, a stack of many.

    Shapes: L tensors (...) -> (L, ...).
    """
    return tensors[0].detach()[None] if len(tensors) == 1 else torch.stack(list(tensors)).detach()


def stack_flat(gradient: Tangent, index: int) -> Tensor:
    """Everything in one matrix's gradient.

    Shapes: a batched tangent -> (mr + r² + nr).
    """
    return torch.cat([part[index].flatten() for part in gradient])


def check_rate(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless a learning rate or weight decay is finite and not negative.

    A tensor on an accelerator is trusted: reading it would wait for the device.
    """
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} needs to be a finite number >= 0, got {number}; pass e.g. 1e-3")


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless both decay rates are in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"betas need to be two numbers in [0, 1), got {betas}; pass e.g. (0.95, 0.95)"
        )
