"""The optimizer class: fetches points, gradients and state, calls the pure step, stores the
result.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_geo import guard
from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.optim import euclidean
from lowrank_geo.optim.advance import take_all
from lowrank_geo.optim.checks import check_group, check_is_state, check_state, geometry_of
from lowrank_geo.optim.copies import mark, with_marks
from lowrank_geo.optim.groups import by_shape, counts, gradients, points_of, with_gradients
from lowrank_geo.optim.pending import Pending
from lowrank_geo.optim.stacks import stack, store
from lowrank_geo.optim.step import Rule, propose, take
from lowrank_geo.optim.values import check_keys, check_rate
from lowrank_geo.precision import full_precision


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
        if isinstance(params, nn.Module):
            raise TypeError(
                f"{type(self).__name__} needs parameter groups, got the module {type(params).__name__}; pass "
                "lowrank_geo.param_groups(model)"
            )
        if not isinstance(params, Iterable):
            raise TypeError(
                f"{type(self).__name__} needs parameter groups, got {params!r}; pass lowrank_geo.param_groups(model)"
            )
        if euclidean_lr is not None:
            check_rate("euclidean_lr", euclidean_lr)
        self._euclidean_lr = defaults["lr"] if euclidean_lr is None else euclidean_lr
        self._transports: dict[Tensor, Tensor] = {}  # S -> τ
        self._compiled: dict[str, Any] | None = None  # the options
        super().__init__(
            params, {"geometry": "euclidean", "maximize": False, "max_advance": None, **defaults}
        )

    _propose_step = staticmethod(propose)
    _take_step = staticmethod(take)

    def __getstate__(self) -> dict[str, Any]:
        return with_marks(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(mark(state))
        if state.get("_compiled") is not None:
            self.compile(**state["_compiled"])

    def rule(self, group: dict[str, Any]) -> Rule:
        """Metric, filter and direction for a group; off the manifold the metric says nothing."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with fresh state at once.

        Raises: ValueError if a triple is split, badly shaped, not orthonormal or in a group of
            the wrong geometry.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(
                "a parameter group needs to be a dict with 'params', got "
                f"{list(param_group) if isinstance(param_group, dict) else type(param_group).__name__}; pass e.g. "
                "{'params': [weight]}"
            )
        group = dict(param_group)
        if geometry_of(group) == "euclidean":
            group.setdefault("lr", self._euclidean_lr)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            arguments = inspect.signature(type(self)).parameters
            check_keys(group, {"params", "layers", *self.defaults}, arguments)
            check_group(added)
            rule = self.rule(added)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        self._create_state(added, rule)

    @torch.no_grad()
    def _create_state(self, group: dict[str, Any], rule: Rule) -> None:
        for parameter in group["params"]:
            kind = {"device": parameter.device, "dtype": torch.float32}
            self.state[parameter]["step"] = torch.zeros((), **kind)
        if group["geometry"] != "fixed_rank":
            for parameter in group["params"]:
                for name in ("momentum", *rule.direction.flat_slots):
                    dtype = torch.promote_types(parameter.dtype, torch.float32)
                    self.state[parameter][name] = torch.zeros_like(parameter, dtype=dtype)
            return
        for point in points_of(group):
            detached = Point(*(p.detach() for p in point))
            fresh = {"momentum": Tangent(*(torch.zeros_like(p) for p in detached))}
            for name, parts in {**fresh, **rule.direction.slots(detached)}.items():
                for parameter, part in zip(point, parts, strict=True):
                    self.state[parameter][name] = part

    def compile(self, **options: Any) -> None:
        """Compile the arithmetic of the steps on the manifold: once for each shape of matrix, whatever the schedule.

        Args: options: of torch.compile, e.g. backend.
        """
        self._propose_step = torch.compile(propose, fullgraph=True, **options)
        self._take_step = torch.compile(take, fullgraph=True, **options)
        self._compiled = options

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        take_all(self.pending())
        return loss

    @torch.no_grad()
    def pending(self) -> Iterator[Pending]:
        """The step in parts, for those who choose its length from all of it: take each exactly once."""
        for group in self.param_groups:
            if group["geometry"] == "fixed_rank":
                for points in self._buckets(group):
                    yield self._propose(group, points)
            elif params := [p for p in group["params"] if p.grad is not None]:
                yield self._propose_flat(group, params)

    def _buckets(self, group: dict[str, Any]) -> Iterator[list[Point]]:
        """The triples with a gradient, by shape, dtype and device."""
        points = with_gradients(points_of(group))
        for point in points:
            if not guard.is_marked(point.U):
                raise RuntimeError(
                    f"{type(self).__name__}.step needs layers with gradient='tangent', got a layer set to "
                    "'factors' after the optimizer was built; set layer.gradient = 'tangent'"
                )
        return by_shape(points)

    @full_precision()
    def _propose(self, group: dict[str, Any], points: list[Point]) -> Pending:
        columns = list(zip(*points, strict=True))  # all U, all S, all V
        rule = self.rule(group)
        names = ("momentum", *rule.direction.slots(Point(*(c[0] for c in columns))))
        gradient = Tangent(*(stack(gradients(group, column)) for column in columns))
        states = {
            name: Tangent(*(stack([self.state[p][name] for p in column]) for column in columns))
            for name in names
        }
        point = Point(*(stack(column) for column in columns))
        step = self._count(group["lr"], points, gradient)
        proposal = self._propose_step(rule, point, gradient, states.pop("momentum"), states, step)

        @torch.no_grad()
        @full_precision()
        def move(lr: float | Tensor) -> None:
            if self._compiled is not None and not isinstance(
                lr, Tensor
            ):  # a number would be compiled in
                lr = torch.full((), lr, device=point.S.device)
            moved = self._take_step(rule, point, proposal, lr, group["weight_decay"])
            for column, new in zip(columns, moved.point, strict=True):
                store(list(column), new)
            for name, parts in {"momentum": moved.momentum, **moved.slots}.items():
                for column, part in zip(columns, parts, strict=True):
                    store([self.state[p][name] for p in column], part)
            for at, tau in zip(points, moved.transport.unbind(), strict=True):
                self._transports[at.S] = tau

        return Pending(
            group, lambda: proposal.slope().sum(), lambda: proposal.squares().sum(-1), move
        )

    def _count(self, lr: float | Tensor, points: list[Point], gradient: Tangent) -> Tensor:
        """Advance the counters; returns them, at least 1, for the bias corrections.

        Shapes: -> (L,).
        """
        active = counts(lr, gradient)
        for column in zip(*points, strict=True):
            torch._foreach_add_(
                [self.state[p]["step"] for p in column], 1.0 if active is None else active
            )
        return torch.stack([self.state[point.S]["step"] for point in points]).clamp(min=1)

    @full_precision()
    def _propose_flat(self, group: dict[str, Any], params: list[Tensor]) -> Pending:
        states = [self.state[p] for p in params]
        kinds = [torch.promote_types(p.dtype, torch.float32) for p in params]
        grads = [g.to(kind) for g, kind in zip(gradients(group, params), kinds, strict=True)]
        active = counts(group["lr"], grads)
        torch._foreach_add_([s["step"] for s in states], 1.0 if active is None else active)
        rule = self.rule(group)
        found = euclidean.directions(rule.filter, rule.direction, grads, states)

        @torch.no_grad()
        @full_precision()
        def move(lr: float | Tensor) -> None:
            euclidean.descend(params, found, lr, group["weight_decay"])

        slope, squares = (partial(f, grads, found) for f in (euclidean.slope, euclidean.squares))
        return Pending(group, slope, squares, move)

    def transports(self) -> dict[str, float]:
        """τ = |Tm|/|m| of the last step by layer name: how much momentum survived the transport.

        Reads back to the host.
        """
        found = {}
        for group in self.param_groups:
            for name, S in zip(group.get("layers", ()), group["params"][1::3], strict=False):
                if S in self._transports:
                    found[name] = float(self._transports[S])
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer, but state keeps the dtype it was saved with.

        Raises: ValueError for what is no state of an optimizer, or if a saved tensor does not have the shape of
            this optimizer's.
        """
        check_is_state(f"{type(self).__name__}.load_state_dict", state_dict)
        pairs = [
            (parameter, state_dict["state"].get(key, {}))
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
            for parameter, key in zip(group["params"], saved["params"], strict=False)
        ]
        for parameter, saved in pairs:
            check_state(f"{type(self).__name__}.load_state_dict", self.state[parameter], saved)
        super().load_state_dict(state_dict)
        for parameter, saved in pairs:
            self.state[parameter] = {
                name: value.detach().to(parameter.device).clone() for name, value in saved.items()
            }
