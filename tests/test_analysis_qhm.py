"""qhm and linear: the paper's figures, closed forms, and the real optimizer at the edge and in the noise."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_geo.analysis import linear, qhm
from lowrank_geo.analysis.two_step import quasi_hyperbolic, two_step
from lowrank_geo.optim import RiemannianSGD
from lowrank_geo.optim.filters import EMA, QHM, Coefficients, HeavyBall, Nesterov, NesterovEMA

BETAS = [*np.linspace(0, 0.8, 9).round(2), 0.85, 0.9, 0.93, 0.95]
NUS = [*np.linspace(0, 0.9, 13).round(3), 0.95, 0.98, 1.0]
RATES = {  # R*(ν) for κ = 10, 100, 1000
    0.0: (0.818, 0.980, 0.998),
    0.3: (0.692, 0.958, 0.996),
    0.5: (0.633, 0.939, 0.994),
    0.7: (0.583, 0.907, 0.989),
    0.9: (0.540, 0.855, 0.971),
    0.99: (0.522, 0.823, 0.944),
    1.0: (0.520, 0.819, 0.939),
}
# α, β, ν -> the mean loss that the authors' notebook prints: of one run, eigenvalues 1 and 0.1, noise 0.3 I
FIGURE_2 = {
    (1, 0.9, 0.7): 0.11,
    (0.1, 0.9, 0.7): 0.02,
    (1, 0.99, 0.7): 0.06,
    (1, 0.9, 1): 0.14,
    (4, 0.8, 0.7): 0.83,
    (0.4, 0.8, 0.7): 0.05,
    (4, 0.95, 0.7): 0.46,
    (4, 0.8, 1): 0.69,
}


class Each:
    """A filter of its own for each row of one parameter: the real coefficients of each, as columns."""

    def __init__(self, filters, dimensions):
        rows = zip(*(f.coefficients(None) for f in filters), strict=True)
        shape = (1, -1, *[1] * (dimensions - 1))  # one parameter, its rows
        self.columns = Coefficients(
            *(torch.tensor(c, dtype=torch.float64).view(shape) for c in rows)
        )

    def coefficients(self, step):
        return self.columns


def stays(filters, edges, steps=300):
    """Whether the real optimizer contracts at 0.98 and at 1.02 of each edge; curvature 0.98 and 1.02 times it, lr 1."""
    x = nn.Parameter(torch.ones(len(filters), 2, dtype=torch.float64))
    curvatures = torch.outer(
        torch.tensor(edges, dtype=torch.float64), torch.tensor([0.98, 1.02]).double()
    )
    rule = filters[0] if len(filters) == 1 else Each(filters, 2)
    optimizer, seen = RiemannianSGD([x], lr=1.0, filter=rule), []
    for _ in range(steps):
        x.grad = curvatures * x.detach()
        optimizer.step()
        seen.append(x.detach().abs().clone())
    early, late = (torch.stack(part).amax(0) for part in (seen[150:200], seen[250:]))
    return (late < early).tolist()


def test_the_real_optimizer_is_stable_just_below_the_bound_and_unstable_just_above():
    grid = list(itertools.product(BETAS, NUS))
    assert len(grid) >= 200
    edges = [qhm.alpha_max(beta, nu, 1.0) for beta, nu in grid]
    found = stays([QHM(nu, beta) for beta, nu in grid], edges)
    assert [at for at, each in zip(grid, found, strict=True) if each != [True, False]] == []


@pytest.mark.parametrize(
    "filter",
    [HeavyBall(0.9), Nesterov(0.8), EMA(0.7), NesterovEMA(0.6), QHM(0.3, 0.9), QHM(0.95, 0.5)],
    ids=str,
)
def test_every_filter_has_its_bound(filter):
    assert stays([filter], [linear.largest_step(two_step(filter))]) == [[True, False]]


@pytest.mark.parametrize("beta, nu", list(itertools.product(BETAS[::2], NUS[::3])))
def test_the_bound_is_where_the_rate_passes_one(beta, nu):
    edge = qhm.alpha_max(beta, nu, 4.0)
    assert edge == pytest.approx(2 * (1 + beta) / (4 * (1 + beta * (1 - 2 * nu))), rel=1e-12)
    assert qhm.rate(0.999 * edge, beta, nu, [4.0]) < 1 < qhm.rate(1.001 * edge, beta, nu, [4.0])


@pytest.mark.parametrize("setting", [(0.1, 0.9, 0.7), (1.9, 0.5, 0.2), (3.0, 0.9, 1.0)])
def test_the_rate_is_the_spectral_radius_of_the_companion_matrix(setting):
    first, second = linear.companion(quasi_hyperbolic(*setting[1:]), setting[0], 0.7)
    matrix = np.array([[first, -second], [1.0, 0.0]])
    assert qhm.rate(*setting, [0.7]) == pytest.approx(abs(np.linalg.eigvals(matrix)).max())


@pytest.mark.parametrize("nu", RATES)
def test_the_best_rates(nu):
    for kappa, expected in zip((10, 100, 1000), RATES[nu], strict=True):
        found = qhm.optimal(1.0, kappa, nu)
        # The published ones are on a coarse grid of β: ours may be better by its width.
        assert expected - 2.2e-3 < found.rate < expected + 6e-4
        assert qhm.rate(found.alpha, found.beta, nu, [1.0, kappa]) == pytest.approx(found.rate)


def test_no_other_setting_is_faster():
    found = qhm.optimal(1.0, 100.0, 0.7)
    best = min(
        qhm.rate(float(alpha), float(beta), 0.7, [1.0, 100.0])
        for beta in np.linspace(0, 0.99, 100)
        for alpha in np.linspace(0.2, 1, 60) * qhm.alpha_max(float(beta), 0.7, 100.0)
    )
    assert found.rate <= best < found.rate + 0.01


@pytest.mark.parametrize("kappa, best", [(10, 0.5195), (100, 0.8182), (1000, 0.9387)])
def test_the_optimum_of_heavy_ball(kappa, best):
    found = qhm.optimal(1.0, kappa)
    assert found.rate == pytest.approx(best, abs=1e-4)
    root = math.sqrt(kappa)
    assert found.alpha == pytest.approx(1 / root)
    assert found.beta == pytest.approx(((root - 1) / (root + 1)) ** 2)
    around = [
        qhm.rate(found.alpha * f, 1 - (1 - found.beta) * g, 1.0, [1.0, kappa])
        for f in (0.9, 1, 1.1)
        for g in (0.9, 1, 1.1)
    ]
    assert min(around) >= found.rate - 1e-7


def test_the_best_decay_for_a_given_step():
    for alpha in (0.02, 0.1, 0.5):
        beta = qhm.optimal_beta(alpha, 1.0)
        best = (1 - alpha) / (1 + alpha)
        assert qhm.rate(alpha, beta, 1.0, [1.0]) == pytest.approx(best, abs=1e-7)
        for other in np.linspace(0, 0.99, 60):
            assert qhm.rate(alpha, float(other), 1.0, [1.0]) > best - 1e-7
    assert qhm.optimal_beta(0.1, 1.0) > qhm.optimal_beta(0.2, 1.0)


def test_the_plateau_has_one_rate_and_more_noise_with_every_step():
    low, high = qhm.plateau(0.9, 0.1, 10.0)
    assert (low, high) == (pytest.approx(0.263, abs=1e-3), pytest.approx(3.797, abs=1e-3))
    spectrum = [0.1, 10.0]
    for alpha in np.linspace(low * 1.0001, high * 0.9999, 20):
        assert qhm.rate(float(alpha), 0.9, 1.0, spectrum) == pytest.approx(math.sqrt(0.9), abs=1e-9)
    assert qhm.rate(low / 1.1, 0.9, 1.0, spectrum) > 0.95
    assert qhm.rate(high * 1.0005, 0.9, 1.0, spectrum) > 0.95
    traces = [2 * qhm.stationary_loss(a, 0.9, 1.0, spectrum) for a in (low, 1.0, 2.0, 3.0)]
    assert traces == pytest.approx([0.273, 1.18, 3.12, 8.64], rel=5e-3)


def test_the_variance_of_known_cases():
    a, lam = 0.3, 0.8
    assert qhm.stationary_variance(a, 0.0, 0.0, lam) == pytest.approx(a / (lam * (2 - a * lam)))
    beta = 0.7
    expected = a / (lam * (2 - a * lam * (1 - beta) / (1 + beta)))
    assert qhm.stationary_variance(a, beta, 1.0, lam) == pytest.approx(expected)
    assert qhm.stationary_variance(2.6, 0.0, 0.0, lam) == math.inf


@pytest.mark.parametrize(
    "alpha, beta, nu, steps", [(0.1, 0.9, 0.7, 300), (0.5, 0.9, 0.7, 300), (1, 0.99, 0.7, 400)]
)
def test_the_real_optimizer_has_the_exact_variance(alpha, beta, nu, steps):
    x = nn.Parameter(torch.zeros(10_000, dtype=torch.float64))
    optimizer, moments = RiemannianSGD([x], lr=alpha, filter=QHM(nu, beta)), []
    for step in range(2 * steps):
        x.grad = x.detach() + torch.randn_like(x)
        optimizer.step()
        if step >= steps:
            moments.append(float(x.detach().square().mean()))
    expected = qhm.stationary_variance(alpha, beta, nu, 1.0)
    assert np.mean(moments) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("setting, printed", FIGURE_2.items(), ids=str)
def test_the_losses_of_the_papers_figure(setting, printed):
    """Two digits are printed: within 10 % of the exact loss is a loss that is printed so. 7.6 % at the smallest."""
    found = qhm.stationary_loss(*setting, [1.0, 0.1], 0.3)
    nearest = min(max(found, printed - 0.005), printed + 0.005)
    assert nearest == pytest.approx(found, rel=0.1)


@pytest.fixture(scope="module")
def figure_2():
    """The protocol of its notebook on the real optimizer, 50 times: the mean over 10,000 steps from rest, all counted.

    All eight settings at once: QHM is linear, so that α may stand in the gradients.
    """
    curvatures = torch.tensor([1.0, 0.1], dtype=torch.float64)
    alphas = torch.tensor([alpha for alpha, _, _ in FIGURE_2], dtype=torch.float64)[:, None, None]
    x = nn.Parameter(torch.zeros(8, 50, 2, dtype=torch.float64))
    filters = [QHM(nu, beta) for _, beta, nu in FIGURE_2]
    optimizer = RiemannianSGD([x], lr=1.0, filter=Each(filters, 3))
    total, steps = torch.zeros_like(x), 10_000
    slopes, deviation = alphas * curvatures, alphas * math.sqrt(0.3)  # the covariance is 0.3 I
    for _ in range(steps):
        at = x.detach()
        total += at.square()
        x.grad = slopes * at + deviation * torch.randn_like(at)
        optimizer.step()
    losses = (curvatures * total.detach() / 2).sum(-1) / steps
    return dict(zip(FIGURE_2, losses, strict=True))


@pytest.mark.parametrize("setting, printed", FIGURE_2.items(), ids=str)
def test_the_losses_of_the_papers_figure_on_the_real_optimizer(figure_2, setting, printed):
    """One run, as printed, scatters: by 6 to 9 % at the smallest rate, whose 0.02 is one of the larger runs."""
    runs = figure_2[setting]
    exact = qhm.stationary_loss(*setting, [1.0, 0.1], 0.3)
    assert float(runs.mean()) == pytest.approx(exact, rel=0.04)
    assert float(runs.std()) < 0.13 * exact
    nearest = min(max(exact, printed - 0.005), printed + 0.005)
    assert abs(nearest - exact) < 2 * float(runs.std())


def test_the_published_expansion_holds_for_short_steps_and_says_where_it_does_not():
    for alpha in (0.01, 0.005):
        exact, short = (
            qhm.stationary_variance(alpha, 0.9, 0.7, 1.0, exact=how) for how in (True, False)
        )
        assert short == pytest.approx(exact, rel=0.002)
    assert qhm.stationary_variance(0.0999, 0.9, 0.7, 1.0, exact=False) == pytest.approx(
        0.04189, rel=1e-3
    )
    with pytest.warns(UserWarning, match=r"αλ < 1 − β = 0\.01, got 1;"):
        assert qhm.stationary_variance(1, 0.99, 0.7, 1.0, exact=False) == pytest.approx(-9.77, 1e-3)


def test_other_filters_have_their_bounds_too():
    assert linear.largest_step(two_step(Nesterov(0.5))) == pytest.approx(2 * 1.5 / 2)
    assert qhm.stationary_variance(0.2, 0.6, 0.6, 0.5) == pytest.approx(
        linear.variance(two_step(Nesterov(0.6)), 0.2 * 0.4, 0.5)
    )


BAD = {
    "a negative variance": (
        lambda: qhm.stationary_loss(1, 0.9, 0.7, [1.0], -1.0),
        r"noise >= 0, got -1\.0",
    ),
    "no variance": (
        lambda: qhm.stationary_variance(1, 0.9, 0.7, 1.0, math.nan),
        r"noise >= 0, got nan",
    ),
    "curvatures that are worlds apart": (
        lambda: qhm.optimal(1e-300, 1e300),
        r"curvature_max <= 1e\+12 curvature_min, got 1e-300 and 1e\+300",
    ),
    "nu of 2": (lambda: qhm.rate(1, 0.9, 2, [1]), r"nu in \[0, 1\], got 2"),
    "beta of 1": (lambda: qhm.alpha_max(1.0, 1, 1), r"beta in \[0, 1\), got 1\.0"),
    "no step": (lambda: qhm.rate(0.0, 0.9, 1, [1]), r"alpha > 0, got 0\.0"),
    "a flat direction": (
        lambda: qhm.rate(1, 0.9, 1, [0, 1]),
        r"curvatures > 0, got \[0\.0, 1\.0\]",
    ),
    "exchanged": (lambda: qhm.optimal(10, 0.1), r"curvature_min <= curvature_max, got 10 and 0\.1"),
    "no plateau": (lambda: qhm.plateau(0.5, 0.1, 10.0), r"beta >= 0\.6694 .* got 0\.5"),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD)
def test_refuses(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
