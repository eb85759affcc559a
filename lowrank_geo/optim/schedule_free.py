"""Schedule-free optimization: gradients between a fast iterate and its average, and no horizon."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_geo.optim import iterates
from lowrank_geo.optim.advance import take_all
from lowrank_geo.optim.averaging import average_named
from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.checks import check_loss, check_schedule_free
from lowrank_geo.optim.copies import attributes
from lowrank_geo.optim.polyak import Polyak, scalars
from lowrank_geo.optim.second_points import SecondPoints
from lowrank_geo.optim.weights import Weights, weights_named
from lowrank_geo.precision import full_precision

REMINDERS = {
    "train": "without train() or eval(), so the parameters are y, where gradients are taken",
    "eval": "after eval(); it goes on from there and switches to train()",
}


class ScheduleFree(Optimizer):
    """z ← a step of `optimizer` with the gradient at y = (1 − β) z + β x;  x ← (1 − c) x + c z.

    The parameters hold y while training and x, the result, after `eval()`. x and z are stored beside them. Parameter
    groups and state are those of `optimizer`, which should have no momentum of its own: averaging takes its place.

    Args: weights: of the average, a name or a `Weights`. step_size: a `Polyak` in place of the learning rates.
        average: of two points of rank r, "truncate" or "orthographic". gradient_at: "collapsed" makes y of rank r and
        carries its gradient to the tangent space at z; "branches" evaluates the layers of `model` at the exact
        (1 − β) z + β x, at twice the cost of a layer, and needs no transport. Branches with Polyak need `zero_grad` of
        the optimizer, not of the model, and no loss scaling.
    Raises: ValueError for beta out of [0, 1], unknown names, branches without their model, Polyak with maximize;
        TypeError for an optimizer of another package.
    Source: Defazio et al., The Road Less Scheduled, NeurIPS 2024, arXiv 2405.15682; arXiv 2511.07767 (weights, Polyak).

    >>> from lowrank_geo.optim import RiemannianSGD
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = ScheduleFree(RiemannianSGD([weight], lr=0.5, momentum=0))
    >>> optimizer.train()
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     optimizer.step()
    >>> optimizer.eval()
    >>> bool(weight.abs().max() < 0.02)
    True
    """

    reads_tangent_gradients = True

    def __init__(
        self,
        optimizer: RiemannianOptimizer,
        *,
        beta: float = 0.9,
        weights: str | Weights = "squared",
        step_size: Polyak | None = None,
        average: str = "truncate",
        gradient_at: Literal["collapsed", "branches"] = "collapsed",
        model: nn.Module | None = None,
    ) -> None:
        check_schedule_free(optimizer, beta, step_size, gradient_at, model)
        self._wrapped = False
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.beta, self.defaults = optimizer, beta, optimizer.defaults
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self._weights, self._average = weights_named(weights), average_named(average)
        self._step_size = step_size
        model = model if gradient_at == "branches" else None
        self._second = SecondPoints(model, beta, watch=step_size is not None)
        self.last_step_size: Tensor | None = None  # of Polyak
        self._fresh = True  # x and z still follow the parameters, which may yet be loaded
        self._silent: set[str] = set()
        self._wrapped = True
        self._second.remove(self.param_groups)
        for group in self.param_groups:
            self._adopt(group, training=True)

    def __getstate__(self) -> dict[str, Any]:
        return attributes(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer, with z = x = what they are."""
        if not self._wrapped:  # torch.optim.Optimizer.__init__, before the groups are shared
            return super().add_param_group(param_group)
        training = self.training
        self._second.layers([param_group])
        self.optimizer.add_param_group(param_group)
        self._adopt(self.param_groups[-1], training)

    @property
    def training(self) -> bool:
        """Whether the parameters hold y, not x."""
        return self.param_groups[0]["train_mode"]

    def train(self, mode: bool = True) -> None:
        """The parameters become y, where gradients are taken; x with mode=False."""
        self._silent.add("train")
        if mode != self.training:
            self._show(training=mode)

    def eval(self) -> None:
        """The parameters become x, the average: what to validate and to save."""
        self.train(False)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: float | Tensor | None = None,
        lower_bound: float | Tensor | None = None,
    ) -> Any:
        """One step. Returns the loss, if there is one.

        Args: loss: of the batch, as the gradient is: unscaled. lower_bound: of the loss of this batch, for Polyak.
        Raises: ValueError if Polyak gets no loss, or another step size a lower bound.
        """
        if closure is not None:
            self._start()
            with torch.enable_grad():
                loss = closure()
        if iterates.idle(self.param_groups):
            return loss
        check_loss(self._step_size, loss, lower_bound)
        carry = self._second.model is None or not self.training
        if closure is None:
            self._remind()
        if self._fresh:
            for group in self.param_groups:
                self._adopt(group, self.training)
            self._fresh = False
        values = None
        if self._step_size is not None and loss is not None:
            bound = self._step_size.lower_bound if lower_bound is None else lower_bound
            values = scalars(loss, bound, self._ahead(of_triples=carry))
        with full_precision(), self._at_z(carry):
            self._descend(values)
            for group in self.param_groups:
                iterates.average_in(group, self.state, self._average, self._weights)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the wrapped optimizer; the parameters become the y or x that they were when it was saved, if it had taken
        a step. Reads back to the host.
        """
        self.optimizer.load_state_dict(state_dict)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self._fresh = iterates.fresh(self.param_groups, self.state)
        self._show(training=self.training)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer."""
        super().zero_grad(set_to_none)
        self._second.zero_grad(self.param_groups)

    def _adopt(self, group: dict[str, Any], training: bool) -> None:
        group["train_mode"] = training
        iterates.create(group, self.state)

    @torch.no_grad()
    @full_precision()
    def _show(self, *, training: bool) -> None:
        for group in self.param_groups:
            group["train_mode"] = training
            if self._fresh:
                continue  # y = x = the parameters
            if not training:
                iterates.show("x", group, self.state)
            elif self._second.model is not None and group["geometry"] == "fixed_rank":
                iterates.show("z", group, self.state)
            else:
                iterates.between(group, self.state, self._average, self.beta)
        if training and not self._fresh:
            self._second.set(self.param_groups, self.state)
        else:
            self._second.remove(self.param_groups)

    @contextmanager
    def _at_z(self, carry: bool) -> Iterator[None]:
        """The parameters are z and so are their gradients; afterwards y, and the gradients are those of before."""
        grads = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        try:
            for group in self.param_groups:
                iterates.to_z(group, self.state, carry=carry)
            yield
        finally:
            for p, grad in grads:
                p.grad = grad
            self._show(training=True)

    def _descend(self, values: Tensor | None) -> None:
        if values is None:
            take_all(self.optimizer.pending())
            return
        rule, parts = self._step_size, list(self.optimizer.pending())
        assert rule is not None
        slope = sum((part.slope() for part in parts), torch.zeros_like(values[0]))
        loss, bound, ahead = values
        self.last_step_size = step_size = rule(loss, ahead, slope, bound)
        for part in parts:
            part.take(rule.rate(step_size, part.group["lr"]))

    def _ahead(self, *, of_triples: bool) -> list[Tensor]:
        terms = self._second.ahead(self.param_groups)
        for group in self.param_groups:
            terms += iterates.ahead(group, self.state, of_triples=of_triples)
        return terms

    def _start(self) -> None:
        self._remind()
        if not self.training:
            self._show(training=True)

    def _remind(self) -> None:
        key = "train" if self.training else "eval"
        if key not in self._silent:
            self._silent.add(key)
            warnings.warn(
                f"ScheduleFree.step was called {REMINDERS[key]}; call optimizer.eval() before validating or saving "
                "and optimizer.train() before training",
                stacklevel=3,
            )
