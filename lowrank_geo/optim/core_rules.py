"""Optimizer rules for cores S whose frames rest between augmentations: heavy ball and Adam, and how their state follows
a change of the frames.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from lowrank_geo.optim.augmentation import Change, carried, mixed
from lowrank_geo.optim.filters import check_decay, unbias
from lowrank_geo.optim.values import check_number

CoreSlots = dict[str, Tensor]  # (L, R, R) each
Second = Literal["square-root", "mixed"]


class CoreRule(Protocol):
    """A rule for cores; all tensors are (L, R, R), zero outside the entries in use."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its states."""
        ...

    def __call__(
        self, gradient: Tensor, slots: CoreSlots, used: Tensor, step: Tensor
    ) -> tuple[Tensor, CoreSlots]:
        """The direction, from the entries in use and the count of steps (L,), this one included."""
        ...

    def carry(self, slots: CoreSlots, change: Change) -> CoreSlots:
        """The state in new frames."""
        ...


@dataclass(frozen=True)
class CoreHeavyBall:
    """m ← β m + g; m shares the frames of the weight.

    Raises: ValueError for β out of [0, 1).
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        check_decay("CoreHeavyBall", "beta", self.beta)

    @property
    def names(self) -> tuple[str, ...]:
        return ("momentum",)

    def __call__(
        self, gradient: Tensor, slots: CoreSlots, used: Tensor, step: Tensor
    ) -> tuple[Tensor, CoreSlots]:
        momentum = self.beta * slots["momentum"] + gradient
        return momentum, {"momentum": momentum}

    def carry(self, slots: CoreSlots, change: Change) -> CoreSlots:
        return {"momentum": carried(slots["momentum"], change)}


@dataclass(frozen=True)
class CoreAdam:
    """Adam, entry by entry.

    `second` says how second moments v follow the frames: "square-root" is (Pᵀ√v Q)∘² as published, which after a
    rotation can be far below what the gradients had; "mixed" is (P∘P)ᵀ v (Q∘Q), exact for uncorrelated entries. `age`
    corrects the bias of each entry by its own number of steps, carried along like "mixed"; otherwise entries that
    augmentation has just added are corrected as if they were as old as the rest.

    Raises: ValueError for values out of range.
    Source: Schotthöfer et al., arXiv 2505.08022, algorithm 1 and its code ("square-root", no age).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    second: Second = "square-root"
    age: bool = False

    def __post_init__(self) -> None:
        for beta in self.betas:
            check_decay("CoreAdam", "betas", beta)
        check_number("eps", self.eps, 1e-8)
        if not self.eps > 0:
            raise ValueError(f"CoreAdam needs eps > 0, got {self.eps}; pass e.g. 1e-8")
        if self.second not in ("square-root", "mixed"):
            raise ValueError(
                f"second needs to be 'square-root' or 'mixed', got {self.second!r}; use one of them"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return ("momentum", "second", "age") if self.age else ("momentum", "second")

    def __call__(
        self, gradient: Tensor, slots: CoreSlots, used: Tensor, step: Tensor
    ) -> tuple[Tensor, CoreSlots]:
        beta1, beta2 = self.betas
        m = beta1 * slots["momentum"] + (1 - beta1) * gradient
        v = beta2 * slots["second"] + (1 - beta2) * gradient.square()
        found = {"momentum": m, "second": v}
        steps = step[:, None, None]
        if self.age:
            found["age"] = slots["age"] + used.to(m.dtype)
            steps = found["age"].clamp(min=1)  # out of use it is 0
        mean = m / unbias(beta1, steps).to(m.dtype)
        square = v / unbias(beta2, steps).to(v.dtype)
        return mean / (square.sqrt() + self.eps), found

    def carry(self, slots: CoreSlots, change: Change) -> CoreSlots:
        v = slots["second"]
        found = {
            "momentum": carried(slots["momentum"], change),
            "second": mixed(v, change)
            if self.second == "mixed"
            else carried(v.sqrt(), change).square(),
        }
        return {**found, "age": mixed(slots["age"], change)} if self.age else found
