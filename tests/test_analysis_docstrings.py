"""Every function that the laboratory offers says shapes, units and source."""

import inspect

import pytest

from lowrank_geo import analysis
from lowrank_geo.analysis import linear, manifold, qhm, regularization, runs


def functions():
    """What `lowrank_geo.analysis` and its two modules of formulas offer, and what stands beside it in the API pages."""
    offered = [getattr(analysis, name) for name in analysis.__all__]
    offered += [getattr(qhm, name) for name in qhm.__all__]
    for module in (linear, manifold, regularization, runs):
        offered += [
            value
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
    return sorted({f for f in offered if inspect.isfunction(f)}, key=lambda f: f.__qualname__)


@pytest.mark.parametrize("function", functions(), ids=lambda f: f.__qualname__)
def test_the_docstring_says_shapes_units_and_source(function):
    lines = [line.strip().partition(":")[0] for line in inspect.getdoc(function).splitlines()]
    assert {"Shapes", "Units", "Source"} <= set(lines)


def test_there_are_as_many_as_the_laboratory_needs():
    names = {f.__name__ for f in functions()}
    assert len(names) > 50
    assert {"heavy_ball_flow", "flow_coefficients", "flow_validity_bound", "modified_loss"} < names
    assert {"directional_smoothness", "rate", "alpha_max", "optimal", "plateau"} < names
    assert {"stationary_variance", "frequency_response", "frequency_response_of"} < names
    assert {"spectrum_of_gradients", "noise_floor", "riemannian_flow", "advise"} < names
