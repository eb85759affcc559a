"""How much each iterate weighs in the average of schedule-free optimization."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_geo.optim.values import check_number

FRESH = (0.0, 0.0, 0.0)  # steps counted, sum of weights, largest learning rate


@dataclass(frozen=True)
class Weights:
    """w_t = tʳ γ_tᵖ, and c_t = w_t / Σ_{i≤t} w_i: x_{t+1} = (1 − c_t) x_t + c_t z_{t+1}, with the rate γ_t of the step.

    `largest` puts the largest rate so far in the place of γ_t, so that a decaying schedule does not change the weights,
    as schedulefree does. c₁ = 1: the starting point itself is not averaged.

    Raises: ValueError for a negative power.
    Source: Defazio et al., The Road Less Scheduled, NeurIPS 2024 (tʳ γ²); arXiv 2511.07767 (p = 1, schedulet).
    """

    lr_power: float = 2.0
    step_power: float = 0.0
    largest: bool = False

    def __post_init__(self) -> None:
        for name in ("lr_power", "step_power"):
            check_number(f"Weights' {name}", getattr(self, name), 1.0)
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"Weights needs {name} >= 0, got {getattr(self, name)}; pass e.g. 1.0"
                )

    def __call__(
        self, state: Tensor, lr: float | Tensor, active: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(c, new state). A step that is not active, or whose weight is 0 like all before it, has c = 0.

        Shapes: state (L, 3), `FRESH` to begin with, lr a number or (), active (L,) or None for all -> (L,), (L, 3).
        """
        rate = torch.as_tensor(lr, dtype=state.dtype, device=state.device).expand(len(state))
        counts = torch.ones_like(rate) if active is None else active.to(state.dtype)
        step, total, peak = state.unbind(-1)
        step, peak = step + counts, torch.where(counts > 0, torch.maximum(peak, rate), peak)
        weight = counts * step**self.step_power * (peak if self.largest else rate) ** self.lr_power
        total = total + weight
        c = torch.where(weight > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
        return c, torch.stack([step, total, peak], -1)


NAMED = {"uniform": Weights(0.0), "schedulet": Weights(1.0), "squared": Weights(2.0)}


def weights_named(weights: str | Weights) -> Weights:
    """ "uniform" 1/t, "schedulet" γ_t/Σγ, "squared" γ_t²/Σγ², or the rule itself.

    Raises: ValueError for an unknown name.
    """
    if isinstance(weights, Weights):
        return weights
    if not isinstance(weights, str) or weights not in NAMED:
        raise ValueError(
            f"weights need to be a Weights(...) or one of {', '.join(sorted(NAMED))}, got {weights!r}; "
            "use one of them"
        )
    return NAMED[weights]
