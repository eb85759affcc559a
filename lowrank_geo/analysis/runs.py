"""What a run's recorded sketches say: signal to noise, curvature along the way, spectrum of the gradients, the edge."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lowrank_geo.analysis import linear
from lowrank_geo.analysis.two_step import two_step
from lowrank_geo.optim.filters import Filter
from lowrank_geo.train.run_folder import read_record

FEWEST = 32  # recorded steps below which nothing can be said


class Recorded(NamedTuple):
    """The sketches of a run, before each of its steps.

    Shapes: steps and lr (k), gradients and weights (k, count).
    """

    steps: np.ndarray
    lr: np.ndarray
    gradients: np.ndarray
    weights: np.ndarray


def read_sketches(run: str | Path) -> Recorded:
    """The sketches that `pretrain --probes` recorded; of a step recorded twice the last.

    Shapes: as `Recorded`.
    Units: lr as the optimizer took it; gradients in loss per weight.
    Raises: FileNotFoundError if there is no run; ValueError if it has fewer than 32 steps with sketches.
    Source: `lowrank_geo.sketch`: products ⟨a bᵀ, G⟩ with fixed a, b do not turn with the frames.
    """
    path = Path(run)
    read_record(path)
    found = {}
    file = path / "metrics.jsonl"
    for text in file.read_text("utf-8").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # cut by a crash
            continue
        if isinstance(line, dict) and "gradient_sketch" in line:
            found[line["step"]] = (line["lr"], line["gradient_sketch"], line["weight_sketch"])
    if len(found) < FEWEST:
        raise ValueError(
            f"analyze run needs {FEWEST} steps with sketches, got {len(found)} in {file}; "
            "record them by pretrain --probes 16"
        )
    steps = sorted(found)
    columns = (np.array(x, dtype=float) for x in zip(*(found[s] for s in steps), strict=True))
    return Recorded(np.array(steps), *columns)


def signal_to_noise(gradients: np.ndarray) -> float:
    """|∇L|² over the variance of a batch's gradient, from neighbours: they share the signal, not the noise.

    Signal: mean ⟨g_t, g_{t+1}⟩; all: mean |g_t|². 0 where neighbours do not agree.

    Shapes: gradients (k, count), sketches.
    Units: none.
    Source: derived: E⟨g_t, g_{t+1}⟩ = |∇L|² for noise that is independent from step to step.

    >>> signal_to_noise(np.ones((3, 2)))
    inf
    """
    signal = max(0.0, float((gradients[1:] * gradients[:-1]).mean()))
    noise = float((gradients**2).mean()) - signal
    return signal / noise if noise > 0 else float("inf")


def spectrum(gradients: np.ndarray, length: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """How the power of the gradients is spread over frequencies, by Welch's method with a Hann window.

    Shapes: gradients (k, count) -> ω (length/2 + 1) in radians per update, shares of the power that add up to 1.
    Units: ω in radians per update, shares without.
    Raises: ValueError for fewer than `length` steps.
    Source: Welch, IEEE Trans. Audio Electroacoust. 15(2), 1967.
    """
    if len(gradients) < length:
        raise ValueError(
            f"spectrum needs at least {length} steps, got {len(gradients)}; lower length"
        )
    window = np.hanning(length)[:, None]
    starts = range(0, len(gradients) - length + 1, length // 2)
    pieces = [np.fft.rfft(window * gradients[s : s + length], axis=0) for s in starts]
    power = np.mean([(abs(x) ** 2).mean(1) for x in pieces], axis=0)
    power[1:-1] *= 2  # both signs of a frequency
    return np.linspace(0, np.pi, length // 2 + 1), power / power.sum()


def spectrum_of_gradients(run: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """`spectrum` of a run that recorded sketches, in a frame that does not turn with U and V.

    Shapes: -> ω in radians per update and shares of the power, of one length.
    Units: ω in radians per update, shares without.
    Raises: as `read_sketches`.
    Source: Li et al., ICLR 2025, arXiv 2411.19671, section 3, for the question; Welch's method for the answer.
    """
    gradients = read_sketches(run).gradients
    return spectrum(gradients, min(64, len(gradients)))


def smoothness(recorded: Recorded, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Curvature along the steps, ⟨Δg, Δw⟩/|Δw|² over windows of steps: noise of batches averages out of the numerator.

    Shapes: -> steps, curvatures.
    Units: loss per squared weight.
    Source: as `directional_smoothness`, Lyu et al., arXiv 2506.14806.
    """
    moves, changes = np.diff(recorded.weights, axis=0), np.diff(recorded.gradients, axis=0)
    ends = range(window, len(moves) + 1, window)
    found = [
        (moves[e - window : e] * changes[e - window : e]).sum()
        / max((moves[e - window : e] ** 2).sum(), 1e-300)
        for e in ends
    ]
    return np.array([recorded.steps[e - 1] for e in ends]), np.array(found)


def edge_share(filter: Filter, step: int, lr: float, curvature: float) -> float:
    """lr·λ over the largest that the momentum bears: 1 is the edge of stability.

    Shapes: numbers.
    Units: none.
    Source: derived from `linear.largest_step`.

    >>> from lowrank_geo.optim.filters import HeavyBall
    >>> edge_share(HeavyBall(0.5), 1, 1.0, 3.0)
    1.0
    """
    return lr * curvature / linear.largest_step(two_step(filter, step))
