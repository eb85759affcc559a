"""What an optimizer's own momentum does to gradients of one frequency, measured on a copy of it."""

import copy
import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lowrank_geo import guard
from lowrank_geo.analysis.frequency import Part
from lowrank_geo.analysis.two_step import at_step
from lowrank_geo.optim.base import RiemannianOptimizer

SETTLED = 1e-7  # what is left of the start when the measurement begins
MOST = 200_000  # steps of a measurement


def frequency_response_of(
    optimizer: RiemannianOptimizer,
    omega: ArrayLike,
    *,
    group: int = 0,
    step: int = 1,
    of: Part = "output",
) -> np.ndarray:
    """H(ω) of the momentum that the optimizer really keeps: driven with gradients e^{iωt}, read off its state.

    Works on a deep copy, at learning rate 0, so that points do not move: low-rank layers are driven in S. The output
    a g + b m is made of the measured m, before the direction (sign, variance, polar factor), which is not linear.

    Args: omega: radians per update. group: which of optimizer.param_groups. step: at which a filter that changes along
        the run is frozen.
    Shapes: omega (...) -> (...), complex.
    Units: ω in radians per update, H in output per gradient.
    Error:  1e-6 relative in float32, for one memory of at most 10⁴ steps.
    Raises: TypeError for an optimizer of another package; ValueError for a step below 1 or a filter whose memory is
        longer than 2·10⁵ steps.
    Source: measured; the formula beside it is `frequency_response`, Li et al., ICLR 2025, arXiv 2411.19671, section
        3.

    >>> from lowrank_geo.optim import RiemannianSGD
    >>> optimizer = RiemannianSGD([torch.nn.Parameter(torch.ones(2))], momentum=0.9)
    >>> abs(frequency_response_of(optimizer, [0.0, 1.0])).round(4).tolist()
    [10.0, 1.0927]
    """
    if not isinstance(optimizer, RiemannianOptimizer):
        raise TypeError(
            f"frequency_response_of needs an optimizer of lowrank_geo.optim, got {type(optimizer).__name__}; "
            "wrap its filter in RiemannianSGD"
        )
    if step < 1:
        raise ValueError(f"frequency_response_of needs a step >= 1, got {step}; count from 1")
    filter = optimizer.rule(optimizer.param_groups[group]).filter
    frequencies = np.asarray(omega, dtype=float)
    steps = _memory(float(at_step(filter, step).u))
    # g = cos ωt and g = sin ωt are the parts of e^{iωt}; each drives an entry of its own.
    waves = np.stack([frequencies.ravel() + 0j, frequencies.ravel() + 1j], 1).ravel()
    last = _driven(optimizer, waves, group, step, steps)
    turned = np.exp(-1j * frequencies.ravel() * (steps - 1))
    momentum = ((last[::2] + 1j * last[1::2]) * turned).reshape(frequencies.shape)
    if of == "momentum":
        return momentum
    _, _, a, b = map(float, at_step(filter, step))
    return a + b * momentum


def _memory(u: float) -> int:
    """Steps until a filter has forgotten its start."""
    steps = 2 if u == 0 else math.ceil(math.log(SETTLED) / math.log(abs(u))) + 1
    if steps > MOST:
        raise ValueError(
            f"frequency_response_of needs a pole below {SETTLED ** (1 / MOST):.5f}, got {u}; use frequency_response"
        )
    return steps


@torch.no_grad()
def _driven(
    optimizer: RiemannianOptimizer, waves: np.ndarray, group: int, step: int, steps: int
) -> np.ndarray:
    """The momentum after `steps` gradients cos ωt (wave ω) or sin ωt (wave ω + i), as many at once as have room.

    Shapes: waves (k) -> (k).
    """
    twin, chosen = _twin(optimizer, group)
    driven: Tensor = chosen["params"][1 if chosen["geometry"] == "fixed_rank" else 0]
    now = waves[: driven.numel()]
    late = np.pi / 2 * now.imag  # sin is cos a quarter of a turn later
    for parameter in chosen["params"]:
        parameter.grad = torch.zeros_like(parameter)
    assert driven.grad is not None
    for n in range(steps):
        for parameter in chosen["params"]:
            twin.state[parameter]["step"].fill_(step - 1.0)
        values = np.cos(now.real * n - late)
        driven.grad.view(-1)[: len(now)] = torch.as_tensor(values, dtype=driven.dtype)
        twin.step()
    found = twin.state[driven]["momentum"].view(-1)[: len(now)].double().cpu().numpy()
    if len(now) == len(waves):
        return found
    rest = _driven(optimizer, waves[len(now) :], group, step, steps)
    return np.concatenate([found, rest])


def _twin(optimizer: RiemannianOptimizer, group: int) -> tuple[RiemannianOptimizer, dict[str, Any]]:
    """A copy of one group with copies of its parameters, fresh momentum and learning rate 0."""
    twin = copy.copy(optimizer)
    theirs = optimizer.param_groups[group]
    copies = [p.detach().clone().requires_grad_() for p in theirs["params"]]
    if theirs["geometry"] == "fixed_rank":
        guard.mark(copies)
    twin.param_groups = [{**theirs, "params": copies, "lr": 0.0}]
    twin.state = defaultdict(dict)
    for ours, parameter in zip(copies, theirs["params"], strict=True):
        kept = {name: value.clone() for name, value in optimizer.state[parameter].items()}
        twin.state[ours] = {**kept, "momentum": torch.zeros_like(kept["momentum"])}
    twin._transports = {}
    return twin, twin.param_groups[0]
