"""The report of `lowrank-geo analyze run`."""

from pathlib import Path

import numpy as np

from lowrank_geo.analysis import figures
from lowrank_geo.analysis.frequency import frequency_response
from lowrank_geo.analysis.momenta import momentum_named
from lowrank_geo.analysis.pages import Report
from lowrank_geo.analysis.runs import (
    edge_share,
    read_sketches,
    signal_to_noise,
    smoothness,
    spectrum_of_gradients,
)
from lowrank_geo.canvas import STEP
from lowrank_geo.recorded import printable, quantiles, read_metrics
from lowrank_geo.train.run_folder import read_record


def run_report(run: Path) -> Report:
    """Signal to noise, curvature, spectrum, transport and distance to the edge of a run's low-rank layers.

    Raises: FileNotFoundError if there is no run; ValueError if it has no sketches.
    """
    recorded, config = read_sketches(run), read_record(run)["config"]
    count = len(recorded.steps)
    filter, plain = momentum_named(config["optimizer"], config["steps"])
    middle = int(recorded.steps[count // 2])
    ratio = signal_to_noise(recorded.gradients)
    at, curvature = smoothness(recorded, max(8, count // 12))
    omega, power = spectrum_of_gradients(run)
    passed = abs(frequency_response(filter, omega, step=middle)) ** 2 * power
    high = power[omega > np.pi / 2].sum()
    numbers = [
        ("signal to noise", f"{ratio:.3g}", "|∇L|² over the variance of a batch's gradient"),
        (
            "curvature along the steps",
            f"{np.median(curvature):.3g}",
            "median, loss per squared weight",
        ),
        ("power above ω = π/2", f"{high:.1%}", "of the gradients; white noise has 50 %"),
        (
            "after the momentum",
            f"{passed[omega > np.pi / 2].sum() / passed.sum():.1%}",
            "of what moves the weights",
        ),
    ]
    if plain:
        lr = float(np.median(recorded.lr))
        share = edge_share(filter, middle, lr, float(np.median(curvature)))
        numbers.append(
            ("share of the edge", f"{share:.3g}", "lr·λ over the bound of stability; 1 is the edge")
        )
    steps, taus = quantiles(read_metrics(run).layers["transport"], (0, 0.5))
    if len(steps):
        numbers.append(
            (
                "transport τ",
                f"{np.median(taus[1]):.4f}",
                f"median layer; the lowest was {taus[0].min():.4f}",
            )
        )
    drawn = [
        (
            "Spectrum of the gradients",
            figures.curves(
                {"gradients": (omega, power), "after the momentum": (omega, passed / passed.sum())},
                figures.OMEGA,
                "share of the power (no unit)",
                logs="y",
                half=False,
            ),
            "Measured in products with fixed matrices, so that turning frames do not look like noise. A flat line is "
            "noise; what momentum should keep is on the left.",
        ),
        (
            "Curvature along the steps",
            figures.curves({"": (at, curvature)}, STEP, "⟨Δg, Δw⟩/|Δw|² (loss per weight²)"),
            "An average over windows: gradients of different batches differ by noise, too.",
        ),
    ]
    if len(steps) > 1:
        lines = {"median layer": (steps, taus[1]), "lowest layer": (steps, taus[0])}
        drawn.append(
            (
                "Transport of the momentum",
                figures.curves(lines, STEP, "τ = |Tm|/|m| (no unit)"),
                "It moves the pole of the filter from u to uτ.",
            )
        )
    return Report(
        f"Momentum of the run {printable(run.resolve().name)}",
        str(config["optimizer"]),
        f"{count} steps of {config['optimizer']}, in {recorded.gradients.shape[1]} numbers a step.",
        numbers,
        drawn,
        settings={key: config[key] for key in ("optimizer", "lr", "schedule", "steps", "batch")},
    )
