"""ScheduleFree as a torch optimizer: state, modes, closures, groups, and what a step must leave alone."""

import copy
import io
import pickle

import pytest
import torch
from optimizer_list import Net, snapshot
from schedule_free_list import (
    FORMS,
    INNER,
    build,
    every_form,
    every_form_with_a_loss,
    same,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.optim import RiemannianSGD, ScheduleFree, param_groups


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def data():
    x = torch.randn(64, 8)
    return x, torch.tanh(x @ torch.randn(8, 4))


@every_form_with_a_loss
@pytest.mark.parametrize("training", [True, False])
def test_a_step_of_nothing_changes_nothing(net, data, form, training):
    optimizer = build(net, form)
    train(net, optimizer, data, 2)
    optimizer.train(training)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    points, state = snapshot(net), copy.deepcopy(optimizer.state_dict())
    optimizer.step(closure=None)
    assert same(points, snapshot(net)) and optimizer.training is training
    after = optimizer.state_dict()
    assert all(same(s, after["state"][key]) for key, s in state["state"].items())


@every_form_with_a_loss
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pickled", [True, False], ids=["pickle", "deepcopy"])
def test_a_copy_continues_bit_for_bit(net, data, form, training, pickled):
    optimizer = build(net, form)
    train(net, optimizer, data, 3)
    optimizer.train(training)
    pair = (net, optimizer)
    other, copied = pickle.loads(pickle.dumps(pair)) if pickled else copy.deepcopy(pair)
    assert copied.training is training and copied.state is copied.optimizer.state
    for model, each in ((net, optimizer), (other, copied)):
        train(model, each, data, 3)
        each.eval()
    assert same(snapshot(net), snapshot(other))


@every_form
def test_a_tensor_rate_of_zero_keeps_the_points(net, data, form):
    optimizer = build(net, form)
    train(net, optimizer, data, 2)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    points = snapshot(net)
    optimizer.step()
    assert same(points, snapshot(net))


@every_form
def test_gradients_are_the_same_objects_with_the_same_bits(net, data, form):
    optimizer = build(net, form)
    train(net, optimizer, data, 2)
    optimizer.zero_grad()
    net(data[0]).square().mean().backward()
    before = {p: (p.grad, p.grad.clone()) for p in net.parameters() if p.grad is not None}
    optimizer.step()
    for p, (grad, bits) in before.items():
        assert p.grad is grad and torch.equal(grad, bits)
    assert net.unused.S.grad is None


def test_a_failed_step_leaves_points_and_gradients(net, data):
    optimizer = build(net)
    train(net, optimizer, data, 2)
    net(data[0]).square().mean().backward()
    net.lm_head.weight.grad = net.lm_head.weight.grad.to_sparse()
    points, grads = snapshot(net), {p: p.grad for p in net.parameters()}
    with pytest.raises(RuntimeError, match="dense real gradients, got a sparse"):
        optimizer.step()
    assert same(points, snapshot(net)) and all(p.grad is g for p, g in grads.items())


@every_form_with_a_loss
@pytest.mark.parametrize("training", [True, False])
def test_resumes_bit_for_bit_in_both_modes(net, data, form, training):
    optimizer = build(net, form)
    train(net, optimizer, data, 3)
    optimizer.train(training)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Net()
    resumed = build(again, form)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.training is training and same(snapshot(net), snapshot(again))
    again.load_state_dict(saved["net"])
    train(net, optimizer, data, 3)
    train(again, resumed, data, 3)
    assert same(snapshot(net), snapshot(again))
    ours, theirs = resumed.state_dict()["state"], optimizer.state_dict()["state"]
    assert all(same(ours[key], theirs[key]) for key in theirs)
    assert all(ours[k][n].dtype == theirs[k][n].dtype for k in theirs for n in theirs[k])


@every_form_with_a_loss
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_distributed_checkpoint_round_trip(net, data, form, training, steps):
    optimizer = build(net, form)
    if steps:
        train(net, optimizer, data, steps)
    optimizer.train(training)
    rates, points = [g["lr"] for g in optimizer.param_groups], snapshot(net)
    saved = get_optimizer_state_dict(net, optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == rates and same(points, snapshot(net))
    other = copy.deepcopy(net)
    resumed = build(other, form)
    resumed.train(training)
    set_optimizer_state_dict(other, resumed, saved)
    assert resumed.training is training and same(points, snapshot(other))
    optimizer.train(), resumed.train()
    train(net, optimizer, data, 2)
    train(other, resumed, data, 2)
    assert same(snapshot(net), snapshot(other))


def test_weights_loaded_after_construction_are_adopted(net, data):
    """z and x are copies; a model loaded later must not be undone by the first step."""
    optimizer = build(net, FORMS["branches"])
    other = Net()
    net.load_state_dict(other.state_dict())
    twin = build(other, FORMS["branches"])
    optimizer.eval()
    train(net, optimizer, data, 2)
    train(other, twin, data, 2)
    assert same(snapshot(net), snapshot(other))


def test_works_without_modes_with_one_warning(net, data):
    optimizer = ScheduleFree(INNER["sgd"](param_groups(net)))
    reference = copy.deepcopy(net)
    for i in range(3):
        net.zero_grad()
        net(data[0]).square().mean().backward()
        if i == 0:
            with pytest.warns(UserWarning, match=r"without train\(\)"):
                optimizer.step()
        else:
            optimizer.step()
    optimizer.eval()
    net(data[0]).square().mean().backward()
    with pytest.warns(UserWarning, match=r"after eval\(\)"):
        optimizer.step()
    assert optimizer.training
    optimizer.eval()
    optimizer.step()  # once is enough
    assert not same(snapshot(net), snapshot(reference))


def test_a_closure_is_evaluated_at_y(net, data):
    optimizer = build(net)
    train(net, optimizer, data, 3)
    y = snapshot(net)
    optimizer.eval()
    seen = []

    def closure():
        seen.append((torch.is_grad_enabled(), same(y, snapshot(net))))
        return net(data[0]).square().mean()

    with pytest.warns(UserWarning, match="after eval"):
        loss = optimizer.step(closure=closure)
    assert seen == [(True, True)] and loss > 0


@every_form
def test_groups_added_later_train(net, data, form):
    late = LowRankConv2d(2, 4, 3, rank=2)
    net.late = late
    net.late.requires_grad_(False)
    optimizer = build(net, form)
    train(net, optimizer, data, 2)
    late.requires_grad_(True)
    for group in param_groups(late):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == len(optimizer.optimizer.param_groups)
    before = late.S.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        late(torch.randn(2, 2, 5, 5)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(late.S, before)


def test_bfloat16_averages_in_float32():
    linear = nn.Linear(6, 6).bfloat16()
    optimizer = ScheduleFree(RiemannianSGD(linear.parameters(), lr=1e-2, momentum=0))
    optimizer.train()
    for _ in range(3):
        optimizer.zero_grad()
        linear(torch.randn(4, 6).bfloat16()).square().sum().backward()
        optimizer.step()
    kinds = {k: v.dtype for k, v in optimizer.state[linear.weight].items()}
    assert kinds["z"] == torch.bfloat16 and kinds["x"] == torch.float32
    optimizer.eval()
    assert torch.equal(linear.weight, optimizer.state[linear.weight]["x"].bfloat16())
