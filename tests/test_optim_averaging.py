"""Averages of points: dense oracles, exact ends, gauge; and the weights of the iterates."""

import pytest
import torch
from oracles import best_approximation, dense, orthonormality, rotation, tangent_projection
from tiny_models import relative

from lowrank_geo.geometry import Point
from lowrank_geo.optim.averaging import AVERAGES, average_named, orthographic, truncate
from lowrank_geo.optim.weights import FRESH, NAMED, Weights, weights_named

every_average = pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)


def turned(p):
    """The same matrix with other frames."""
    r = p.S.shape[-1]
    Q, P = rotation(r), rotation(r)
    return Point(p.U @ Q, Q.mT @ p.S @ P, p.V @ P)


def near(p, size=0.1):
    """A point of rank r at about that relative distance."""
    W = dense(p)
    noise = torch.randn_like(W)
    P, sigma, Qt = torch.linalg.svd(W + size * W.norm() / noise.norm() * noise)
    r = p.S.shape[-1]
    return Point(P[:, :r], torch.diag(sigma[:r]), Qt[:r].mT)


@pytest.mark.parametrize("m, n, r", [(9, 7, 3), (6, 6, 6), (20, 5, 4), (8, 8, 1)])
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_truncate_is_the_nearest_matrix_of_its_rank(point, m, n, r, c):
    """Worst of 200 draws 1.4e-14, frames 2.4e-15."""
    x, z = point(m, n, r), point(m, n, r)
    found = truncate(x, z, c)
    wanted = best_approximation((1 - c) * dense(x) + c * dense(z), r)
    assert relative(dense(found), wanted) < 1.4e-13
    assert max(orthonormality(found.U), orthonormality(found.V)) < 3e-14


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 1 - 1e-9])
def test_orthographic_has_the_average_as_its_tangent_part(point, c):
    """P_T(average) = x + c P_T(z − x), and it tends to z for c → 1; worst of 200 draws 2.8e-15, the limit 1e-10."""
    x = point(9, 7, 3, core=10.0)
    z = near(x)
    found = orthographic(x, z, c)
    wanted = dense(x) + c * tangent_projection(x, dense(z) - dense(x))
    assert relative(tangent_projection(x, dense(found)), wanted) < 3e-14
    if c > 0.99:
        assert relative(dense(found), dense(z)) < 1e-9


@every_average
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_the_operands_bit_for_bit(average, point, dtype):
    x, z = (point(8, 6, 3, dtype, batch=(4,)) for _ in "xz")
    c = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype)
    found = average(x, z, c)
    for part, a, b in zip(found, x, z, strict=True):
        assert torch.equal(part[::2], a[::2]) and torch.equal(part[1::2], b[1::2])
    same = average(x, x, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(same, x, strict=True))


@every_average
def test_average_is_gauge_invariant(average, point):
    """Of the same matrices in other frames, also for x = z; worst of 100 draws 4.4e-15."""
    for _ in range(10):
        x = point(12, 9, 4, core=10.0)
        z = near(x)
        for a, b in ((x, z), (x, turned(x))):
            wanted = dense(average(a, b, 0.4))
            assert relative(dense(average(turned(a), turned(b), 0.4)), wanted) < 5e-14
        assert relative(dense(average(x, turned(x), 0.4)), dense(x)) < 5e-14


@every_average
def test_batches_equal_single_matrices(average, point):
    x = point(8, 6, 3, batch=(5,), core=10.0)
    z = Point(
        *(
            torch.stack(p)
            for p in zip(*(near(Point(*q)) for q in zip(*x, strict=True)), strict=True)
        )
    )
    c = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    found = dense(average(x, z, c))
    for i in range(5):
        one = average(Point(*(p[i] for p in x)), Point(*(p[i] for p in z)), c[i])
        assert relative(found[i], dense(one)) < 1e-12


@every_average
def test_singular_and_infinite_operands(average, point):
    x, z = (point(8, 6, 3, torch.float32, core="zero") for _ in "xz")
    found = average(x, z, 0.5)
    assert dense(found).abs().max() == 0 and orthonormality(found.U) < 1e-5
    z.S[0, 0] = torch.inf
    assert not dense(average(x, z, 0.5)).isfinite().all()


@every_average
def test_average_beats_the_last_noisy_iterate(average, point):
    """z = T_r(W + noise) 400 times: the streaming average is as good as the dense one, z.s error is sqrt(400) larger
    but for the bias of the truncation."""
    W = point(20, 15, 3, core=3.0)
    x, total, errors = W, torch.zeros(20, 15, dtype=torch.float64), []
    for t in range(1, 401):
        z = near(W, 0.1)
        x, total = average(x, turned(z), 1 / t), total + dense(z)
        errors.append(relative(dense(z), dense(W)))
    ours, densely = relative(dense(x), dense(W)), relative(total / 400, dense(W))
    assert ours < 1.2 * densely and ours < 0.2 * sum(errors) / 400


RATES = torch.tensor([0.5, 1.0, 1.0, 0.25, 0.0, 0.5], dtype=torch.float64)
STEPS = torch.arange(1, 7, dtype=torch.float64)
FORMS = {
    "uniform": (NAMED["uniform"], torch.ones(6, dtype=torch.float64)),
    "schedulet": (NAMED["schedulet"], RATES),
    "squared": (NAMED["squared"], RATES**2),
    "library": (Weights(2.0, 0.75, largest=True), STEPS**0.75 * RATES.cummax(0)[0] ** 2),
}


@pytest.mark.parametrize("rule, w", FORMS.values(), ids=FORMS)
def test_weights_are_their_closed_forms(rule, w):
    state, found = torch.tensor([FRESH], dtype=torch.float64), []
    for lr in RATES:
        c, state = rule(state, lr)
        found.append(c.item())
    assert found == pytest.approx((w / w.cumsum(0)).tolist(), abs=1e-15)
    state, constant = torch.tensor([FRESH], dtype=torch.float64), []
    if rule.step_power == 0:
        for _ in STEPS:
            c, state = rule(state, 0.3)
            constant.append(1 / c.item())
        assert constant == pytest.approx(STEPS.tolist())


def test_weights_of_nothing_are_zero():
    state = torch.tensor([FRESH, FRESH], dtype=torch.float64)
    c, after = NAMED["squared"](state, 0.0)
    assert c.tolist() == [0, 0]
    c, after = NAMED["uniform"](state, 0.1, torch.tensor([True, False]))
    assert c.tolist() == [1, 0] and torch.equal(after[1], state[1])


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: average_named("factors"), "orthographic, truncate, got 'factors'"),
        (lambda: weights_named("linear"), "schedulet, squared, uniform, got 'linear'"),
        (lambda: Weights("a"), "lr_power needs to be a number, got 'a'"),
        (lambda: Weights(-1.0), r"lr_power >= 0, got -1\.0"),
        (lambda: Weights(step_power=float("nan")), "step_power >= 0, got nan"),
    ],
)
def test_refuses(make, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        make()
