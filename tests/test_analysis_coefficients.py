"""coefficients and trees: closed forms of the limit, the scalar recursions as oracle of the trees, refusals."""

import math

import numpy as np
import pytest

from lowrank_geo.analysis.coefficients import (
    counter_terms,
    flow_coefficients,
    settled,
    steady,
)
from lowrank_geo.analysis.trees import forest, vertices
from lowrank_geo.analysis.two_step import TwoStep, two_step, validity_bound
from lowrank_geo.optim.filters import EMA, FSGDM, QHM, HeavyBall, Nesterov, NesterovEMA

FILTERS = [HeavyBall(0.8), Nesterov(0.7), EMA(0.6), NesterovEMA(0.5), QHM(0.3, 0.6)]
CHAIN = {1: (), 2: ((),), 3: (((),),), 4: ((((),),),), 5: (((((),),),),), 6: ((((((),),),),),)}


def test_the_count_of_rooted_trees():
    sizes = [vertices(tree) for tree in forest(7).trees]
    assert [sizes.count(n) for n in range(1, 8)] == [1, 1, 2, 4, 9, 20, 48]  # OEIS A000081


def test_the_recursions_of_the_paper_at_0_9():
    assert [counter_terms(0.9, k).c for k in range(3)] == pytest.approx([1, 1.9, 2.71])
    gammas = [counter_terms(0.9, k).gamma for k in (0, 1, 2, 5, 20, None)]
    assert gammas == pytest.approx([0.5, 2.705, 7.731, 43.96, 479, 950], rel=2e-3)
    assert counter_terms(0.9, None)[2:] == pytest.approx([180333.333333, 90083.333333])


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 0.99])
def test_the_recursions_reach_their_limits(mu):
    limit = counter_terms(mu, None)
    assert counter_terms(mu, 6000) == pytest.approx(limit, rel=1e-12)
    assert limit.p - 2 * limit.q == pytest.approx(1 / (6 * (1 - mu) ** 3), rel=1e-8)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("k", [0, 1, 2, 7, 40, None])
def test_the_trees_agree_with_the_scalar_recursions(mu, k):
    c, gamma, p, q = counter_terms(mu, k)
    found = flow_coefficients(mu, k, 3)
    expected = {(): c, ((),): -gamma, (((),),): p, ((), ()): q}
    for tree, value in expected.items():
        assert found[tree] == pytest.approx(value, rel=1e-12), tree


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9])
def test_the_limit_at_order_four(mu):
    found, scale = flow_coefficients(mu, None, 4), -1 / (1 - mu) ** 7
    assert found[((), (), ())] == pytest.approx(scale * mu * (1 + mu) / 2, rel=1e-9, abs=1e-12)
    assert found[((), ((),))] == pytest.approx(
        scale * (1 + mu) * (1 + 28 * mu + mu**2) / 12, rel=1e-9
    )
    assert found[(((), ()),)] == pytest.approx(
        scale * (1 + mu) * (1 + 16 * mu + mu**2) / 12, rel=1e-9
    )
    assert found[CHAIN[4]] == pytest.approx(scale * (1 + mu) * (1 + 8 * mu + mu**2) / 4, rel=1e-9)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("n", range(1, 7))
def test_the_chains_follow_the_narayana_polynomials(mu, n):
    narayana = sum(math.comb(n - 1, k) ** 2 * mu**k for k in range(n))
    expected = (-1) ** (n - 1) * narayana / (n * (1 - mu) ** (2 * n - 1))
    assert flow_coefficients(mu, None, n)[CHAIN[n]] == pytest.approx(expected, rel=1e-8)


def test_gradient_descent_has_the_terms_of_its_backward_error():
    for k in (0, 3, None):
        found = flow_coefficients(0.0, k, 3)
        assert list(found.values()) == pytest.approx([1, -1 / 2, 1 / 12, 1 / 3], rel=1e-14)


@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_the_transient_ends_in_the_steady_series(filter):
    *_, last = settled(two_step(filter), 5)
    assert last == pytest.approx(steady(two_step(filter), 5), rel=1e-10)


def test_quasi_hyperbolic_momentum_has_its_closed_forms():
    nu, beta = 0.3, 0.6
    gamma, fields = (1 - nu * beta) ** 2 / 2, settled(two_step(QHM(nu, beta)), 2)
    for k, (c, found) in enumerate(fields):
        assert c == pytest.approx(1 - nu * beta ** (k + 1))
        if k:
            before = 1 - nu * beta**k
            gamma = c**2 / 2 + beta * (gamma + before**2 / 2) - beta * (1 - nu) * before
        assert -found == pytest.approx(gamma)
    assert gamma == pytest.approx(1 / 2 + nu * beta / (1 - beta))


@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_two_points_are_enough_for_every_filter(filter):
    u, v, a, b = filter.coefficients(None)
    beta, current, previous = two_step(filter)
    rng = np.random.default_rng(0)
    m, x, points, grads = 0.0, 0.0, [0.0], rng.standard_normal(6)
    for g in grads:
        m = u * m + v * g
        x -= a * g + b * m
        points.append(x)
    for k in range(1, 6):
        moved = beta * (points[k] - points[k - 1]) - current * grads[k] - previous * grads[k - 1]
        assert points[k + 1] - points[k] == pytest.approx(moved)


@pytest.mark.parametrize(
    "mu, bound", [(0.5, 0.0858), (0.8, 0.0111), (0.9, 0.00263), (0.99, 2.5e-5)]
)
def test_the_validity_bound_of_heavy_ball(mu, bound):
    found = validity_bound(two_step(HeavyBall(mu)))
    assert found == pytest.approx((1 - math.sqrt(mu)) ** 2, rel=1e-12)
    assert found == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_beyond_the_bound_the_companion_roots_are_complex(filter):
    method = two_step(filter)
    beta, a, b = method
    for factor, real in ((0.999, True), (1.001, False)):
        s = factor * validity_bound(method)
        assert ((1 + beta - a * s) ** 2 > 4 * (beta + b * s)) is real


BAD = {
    "mu of 1": (lambda: flow_coefficients(1.0, 0, 1), r"mu in \[0, 1\), got 1\.0"),
    "a negative mu": (lambda: counter_terms(-0.1, 0), r"mu in \[0, 1\), got -0\.1"),
    "order 0": (lambda: flow_coefficients(0.9, 0, 0), "order between 1 and 8, got 0"),
    "order 9": (lambda: flow_coefficients(0.9, 0, 9), "order between 1 and 8, got 9"),
    "a negative step": (lambda: flow_coefficients(0.9, -1, 2), "k >= 0, got -1"),
    "a filter that moves": (lambda: two_step(FSGDM(100)), "constant coefficients, got FSGDM"),
    "bias correction": (
        lambda: two_step(EMA(0.9, unbiased=True)),
        "constant coefficients, got EMA",
    ),
    "step 0": (lambda: two_step(FSGDM(100), 0), "step >= 1, got 0"),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD)
def test_refuses(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_filter_that_moves_has_a_recursion_at_every_step():
    assert two_step(FSGDM(4, c=1 / 9, stages=4), 4) == TwoStep(pytest.approx(0.9), 1.0, 0.0)
