"""The bound of how far a step goes along the gradient."""

import copy

import pytest
import torch
from optimizer_list import Net, backward, run, snapshot
from torch import nn

from lowrank_geo.geometry import Tangent, inner
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import (
    AugmentedAdam,
    RiemannianAdam,
    RiemannianMuon,
    RiemannianSGD,
    ScheduleFree,
    param_groups,
)
from lowrank_geo.optim.advance import LEAST_COSINE, peak

FAMILY = {
    "adam": RiemannianAdam,
    "muon": RiemannianMuon,
    "sgd": RiemannianSGD,
    "dlrt adam": AugmentedAdam,
}


@pytest.fixture
def data():
    torch.manual_seed(1)
    return torch.randn(16, 8, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return Net().double()


def dense(layer):
    return (layer.U @ layer.S @ layer.V.mT).detach().clone()


def low_rank(model):
    return [m for m in model.modules() if isinstance(m, LowRankLinear)]


def bounded(model, make, bound, lr):
    """The bound holds triples of all shapes together, and dense parameters are free."""
    groups = param_groups(model, lr=lr)
    return make(
        [{**g, "max_advance": bound} if g["geometry"] == "fixed_rank" else g for g in groups]
    )


def test_sgd_without_momentum_goes_the_bound_along_the_gradient(data):
    """W moves by −bound·g/|g| to first order, g the gradients of all triples together: float64 against autograd."""
    model, bound = net(), 1e-4
    optimizer = bounded(model, lambda g: RiemannianSGD(g, momentum=0.0), bound, lr=3.0)
    before = [dense(layer) for layer in low_rank(model)[:3]]
    backward(model, data)
    wanted, points = [], []
    for layer in low_rank(model)[:3]:
        g = Tangent(layer.U.grad, layer.S.grad, layer.V.grad)
        U, V = layer.U.detach(), layer.V.detach()
        wanted.append(g.Up @ V.mT + U @ g.M @ V.mT + U @ g.Vp.mT)
        points.append(inner(Tangent(*(x[None] for x in g)), Tangent(*(x[None] for x in g))))
    length = torch.cat(points).sum().sqrt()
    optimizer.step()
    for old, layer, g in zip(before, low_rank(model), wanted, strict=False):
        moved = dense(layer) - old
        torch.testing.assert_close(moved, -bound * g / length, rtol=1e-2, atol=3e-3 * bound)


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_a_step_that_is_too_long_is_the_same_step_shortened(data, make):
    """All parts by one factor, which is that of the formula; what has no bound is not."""
    free, held = net(), net()
    plain, limited = make(param_groups(free, lr=0.3)), bounded(held, make, 0.02, lr=0.3)
    for model in (free, held):
        backward(model, data)
    parts = [p for p in plain.pending() if p.group["geometry"] == "fixed_rank"]
    squares = sum(p.squares() for p in parts)
    along = 0.3 * sum(p.slope() for p in parts) / squares[0].sqrt()
    advance = max(along.item(), LEAST_COSINE * 0.3 * squares[1].sqrt().item())
    assert advance > 0.05  # the bound binds by a factor of more than 2
    again = make(param_groups(free_copy := net(), lr=0.3))
    for group in again.param_groups:
        if group["geometry"] == "fixed_rank":
            group["lr"] *= 0.02 / advance
    backward(free_copy, data)
    for optimizer in (again, limited):
        optimizer.step()
    for (name, wanted), found in zip(free_copy.named_parameters(), held.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_a_step_within_the_bound_is_bit_for_bit_what_it_was(data):
    free, held = net(), net()
    run(free, RiemannianAdam(param_groups(free, lr=1e-3)), data, 5)
    run(held, bounded(held, RiemannianAdam, 1e3, lr=1e-3), data, 5)
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), held.parameters(), strict=True))


def test_rates_that_are_too_large_all_give_the_same_run(data):
    """Also under a schedule, which goes on to shorten steps."""
    ends = []
    for lr in (1.0, 64.0):
        model = net()
        optimizer = bounded(model, RiemannianAdam, 0.05, lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
        factors = []
        for _ in range(8):
            old = [dense(layer) for layer in low_rank(model)[:3]]
            backward(model, data)
            for group in optimizer.param_groups:  # dense ones train alike
                if group["geometry"] != "fixed_rank":
                    group["lr"] = 1e-3
            optimizer.step()
            schedule.step()
            new = [dense(layer) for layer in low_rank(model)[:3]]
            factors.append(sum((a - b).norm().item() for a, b in zip(old, new, strict=True)))
        ends.append([dense(layer) for layer in low_rank(model)[:3]])
        assert factors[-1] < 0.35 * max(factors)  # 1/8 of the peak, and longer where it turns
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_loss_changes_nothing(data, scale):
    runs = []
    for factor in (1.0, scale):
        model = net()
        optimizer = bounded(model, lambda g: RiemannianAdam(g, eps=0.0), 0.05, lr=1.0)
        for _ in range(4):
            backward(model, data, factor)
            for group in optimizer.param_groups[1:]:
                group["lr"] = 0.0
            optimizer.step()
        runs.append([dense(layer) for layer in low_rank(model)[:3]])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_direction_that_opposes_the_gradient_has_a_length_too():
    """Momentum from gradients that have turned round: without the least cosine its step would have no bound."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = RiemannianSGD([{"params": [weight], "max_advance": 0.1}], lr=1e3, momentum=0.9)
    weight.grad = torch.ones(4, dtype=torch.float64)
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.full((4,), -0.5, dtype=torch.float64)
    optimizer.step()
    assert (before - weight).norm().item() == pytest.approx(0.1 / LEAST_COSINE)


def test_the_peak_is_the_largest_rate_that_schedulers_name():
    assert peak({"lr": 0.1}) == 0.1
    assert peak({"lr": 0.1, "initial_lr": 0.4}) == 0.4
    assert peak({"lr": 0.1, "peak_lr": 0.3}) == 0.3
    assert peak({"lr": 0.5, "initial_lr": 0.04, "max_lr": 1.0}) == 1.0
    tensors = {"lr": torch.tensor(0.1), "initial_lr": torch.tensor(0.4), "max_lr": 0.2}
    assert float(peak(tensors)) == pytest.approx(0.4)


def test_a_rate_that_is_lowered_by_hand_shortens_bounded_steps():
    lengths = []
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = RiemannianSGD([{"params": [weight], "max_advance": 0.1}], lr=1e3, momentum=0.0)
    for lr in (1e3, 1e2, 1e3):
        optimizer.param_groups[0]["lr"] = lr
        before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
        optimizer.step()
        lengths.append((before - weight).norm().item())
    assert lengths == pytest.approx([0.1, 0.01, 0.1])


@pytest.mark.parametrize("lr", [1e2, 1e30])
def test_no_rate_is_too_large(lr):
    """Not even one whose square overflows float32: the adapter would stand still."""
    weights = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    groups = [{"params": [weight], "max_advance": 0.1} for weight in weights]
    optimizer = RiemannianSGD(groups, lr=lr, momentum=0.0)
    for weight in weights:
        weight.grad = torch.ones(4)
    optimizer.step()
    assert torch.cat([w.detach() for w in weights]).norm().item() == pytest.approx(0.1)


def test_gradients_that_are_not_finite_stop_the_others():
    """A sound group next to one with a NaN takes no step without a bound."""
    sound, broken = (nn.Parameter(torch.ones(4)) for _ in range(2))
    groups = [{"params": [p], "max_advance": 0.1} for p in (sound, broken)]
    optimizer = RiemannianSGD(groups, lr=1e3, momentum=0.0)
    sound.grad, broken.grad = torch.ones(4), torch.full((4,), float("nan"))
    optimizer.step()
    assert torch.equal(sound, torch.ones(4))


def test_gradients_of_zero_move_nothing(data):
    model = net()
    optimizer = bounded(model, RiemannianAdam, 0.1, lr=1.0)
    before = snapshot(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)


def test_schedule_free_keeps_to_the_bound_too(data):
    ends = []
    for lr in (1.0, 64.0):
        model = net()
        inner_optimizer = bounded(
            model, lambda g: RiemannianAdam(g, betas=(0.0, 0.95)), 0.05, lr=lr
        )
        for group in inner_optimizer.param_groups:
            if group["geometry"] != "fixed_rank":
                group["lr"] = 0.0
        optimizer = ScheduleFree(inner_optimizer, weights="uniform")
        optimizer.train()
        run(model, optimizer, data, 4)
        ends.append([dense(layer) for layer in low_rank(model)[:3]])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_saved_state_goes_on_bit_for_bit(data):
    model = net()
    optimizer = bounded(model, RiemannianAdam, 0.05, lr=1.0)
    run(model, optimizer, data, 3)
    other = copy.deepcopy(model)
    resumed = bounded(other, RiemannianAdam, None, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net_, opt in ((model, optimizer), (other, resumed)):
        run(net_, opt, data, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_mistyped_bound_is_not_passed_over():
    with pytest.raises(ValueError, match="got 'max_advanc'; did you mean 'max_advance'"):
        RiemannianSGD([{"params": [nn.Parameter(torch.ones(2))], "max_advanc": 0.1}], lr=0.1)


@pytest.mark.parametrize(
    "bound, kind, sentence",
    [
        (0.0, ValueError, "max_advance needs to be > 0, got 0.0; pass e.g. 0.3"),
        (-1, ValueError, "max_advance needs to be > 0, got -1; pass e.g. 0.3"),
        (float("nan"), ValueError, "max_advance needs to be > 0, got nan; pass e.g. 0.3"),
        ("0.3", TypeError, "max_advance needs to be a number, got '0.3'; pass e.g. 0.3"),
    ],
)
def test_refuses(bound, kind, sentence):
    with pytest.raises(kind) as error:
        RiemannianAdam([nn.Parameter(torch.ones(2))], max_advance=bound)
    assert str(error.value) == sentence
