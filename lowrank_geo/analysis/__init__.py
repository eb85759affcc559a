"""The theory of the optimizers, computed: what settings will do, to be checked against the real classes."""

from lowrank_geo.analysis import linear, qhm
from lowrank_geo.analysis.advice import Advice, Problem, advise
from lowrank_geo.analysis.balance import balance_change, horizontal, imbalance
from lowrank_geo.analysis.coefficients import CounterTerms, counter_terms, flow_coefficients
from lowrank_geo.analysis.conditions import PowerSchedule, first_theorem, second_theorem
from lowrank_geo.analysis.diagonal import implicit_bias, momentum_bias, shrinkage
from lowrank_geo.analysis.differentials import gradient_of
from lowrank_geo.analysis.flow import Flow, flow_validity_bound, heavy_ball_flow, momentum_flow
from lowrank_geo.analysis.frequency import (
    dynamic_response,
    effective_gain,
    frequency_response,
    gain,
    gradient_weights,
    matched_lr,
)
from lowrank_geo.analysis.manifold import noise_floor, riemannian_flow, riemannian_hessian
from lowrank_geo.analysis.measured import frequency_response_of
from lowrank_geo.analysis.penalty import (
    factor_modified_loss,
    factor_penalty,
    manifold_modified_loss,
    manifold_penalty,
)
from lowrank_geo.analysis.quadratic import QuadraticFlow, quadratic_flow
from lowrank_geo.analysis.regularization import (
    directional_smoothness,
    modified_loss,
    modified_loss_of,
)
from lowrank_geo.analysis.runs import read_sketches, signal_to_noise, spectrum_of_gradients
from lowrank_geo.analysis.two_step import TwoStep, two_step, validity_bound

__all__ = [
    "Advice",
    "CounterTerms",
    "Flow",
    "PowerSchedule",
    "Problem",
    "QuadraticFlow",
    "TwoStep",
    "advise",
    "balance_change",
    "counter_terms",
    "directional_smoothness",
    "dynamic_response",
    "effective_gain",
    "factor_modified_loss",
    "factor_penalty",
    "first_theorem",
    "flow_coefficients",
    "flow_validity_bound",
    "frequency_response",
    "frequency_response_of",
    "gain",
    "gradient_of",
    "gradient_weights",
    "heavy_ball_flow",
    "horizontal",
    "imbalance",
    "implicit_bias",
    "linear",
    "manifold_modified_loss",
    "manifold_penalty",
    "matched_lr",
    "modified_loss",
    "modified_loss_of",
    "momentum_bias",
    "momentum_flow",
    "noise_floor",
    "qhm",
    "quadratic_flow",
    "read_sketches",
    "riemannian_flow",
    "riemannian_hessian",
    "second_theorem",
    "shrinkage",
    "signal_to_noise",
    "spectrum_of_gradients",
    "two_step",
    "validity_bound",
]
