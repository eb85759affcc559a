"""ScheduleFree with the tools around it: devices without host reads, other frames, loss scaling, replicas."""

import copy
import subprocess
import sys

import pytest
import torch
from optimizer_list import Net, NoHostReads, snapshot
from oracles import rotation
from schedule_free_list import build, every_form, same, train
from torch._dynamo.utils import counters

from lowrank_geo.layers import lowrank_layers
from lowrank_geo.optim import Polyak, RiemannianSGD, ScheduleFree, param_groups


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def data():
    x = torch.randn(64, 8)
    return x, torch.tanh(x @ torch.randn(8, 4))


@every_form
@pytest.mark.parametrize("step_size", [None, Polyak(max_lr="lr")], ids=["lr", "polyak"])
def test_the_step_reads_nothing_back_to_the_host(net, data, form, step_size, as_on_a_device):
    optimizer = build(net, {**form, "step_size": step_size})
    train(net, optimizer, data, 2)
    loss = net(data[0]).square().mean()
    loss.backward()
    with NoHostReads():
        optimizer.step(loss=loss)


@every_form
@pytest.mark.parametrize("step_size", [None, Polyak(max_lr="lr")], ids=["lr", "polyak"])
def test_the_trajectory_is_gauge_invariant(net, data, form, step_size):
    """Other frames of the same matrices train the same, over 10 steps in float64; worst of 60 draws 3.2e-15."""
    net, data = net.double(), tuple(x.double() for x in data)
    turned = copy.deepcopy(net)
    for _, layer in lowrank_layers(turned):
        Q, P = rotation(layer.rank), rotation(layer.rank)
        layer.U.data, layer.V.data = layer.U @ Q, layer.V @ P
        layer.S.data = Q.mT @ layer.S @ P
    for model in (net, turned):
        optimizer = build(model, {**form, "step_size": step_size})
        train(model, optimizer, data, 10)
        optimizer.eval()
    for (_, a), (_, b) in zip(lowrank_layers(net), lowrank_layers(turned), strict=True):
        assert (a.weight - b.weight).abs().max() < 4e-14


@every_form
def test_grad_scaler_skips_an_infinite_step(net, data, form):
    optimizer = build(net, form)
    train(net, optimizer, data, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(net(data[0]).square().mean()).backward()
    net.first.S.grad[0, 0] = torch.inf
    points, state = snapshot(net), copy.deepcopy(optimizer.state_dict()["state"])
    scaler.step(optimizer)
    scaler.update()
    after = optimizer.state_dict()["state"]
    assert same(points, snapshot(net)) and all(same(state[key], after[key]) for key in state)


def test_a_compiled_inner_step_is_the_same_and_is_compiled_once(net, data, as_on_a_device):
    torch._dynamo.reset()
    counters.clear()
    twin, graphs = copy.deepcopy(net), []
    ours, reference = build(net), build(twin)
    ours.optimizer.compile(backend="eager")
    for _ in range(4):
        for optimizer in (ours, reference):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        train(net, ours, data, 1)
        train(twin, reference, data, 1)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [4] * 4  # two shapes, proposed and taken
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_clipped_and_maximized_losses_train(net, data):
    groups = [
        {**group, "maximize": True} for group in param_groups(net, lr=0.05, euclidean_lr=0.05)
    ]
    optimizer = ScheduleFree(RiemannianSGD(groups, momentum=0.0))
    optimizer.train()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(data[0]) - data[1]).square().mean()
        (-loss).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


REPLICA = """
import sys, time, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import Polyak, RiemannianSGD, ScheduleFree, param_groups
from lowrank_geo.train.distributed import SETTLE

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=2)


def train(form, split):
    torch.manual_seed(0)
    net = nn.Sequential(LowRankLinear(8, 6, 2), nn.Tanh(), LowRankLinear(6, 4, 2)).double()
    inner = RiemannianSGD(param_groups(net), momentum=0)
    optimizer = ScheduleFree(inner, step_size=Polyak(max_lr=0.3), gradient_at=form, model=net)
    optimizer.train()
    x, y = torch.randn(32, 8).double(), torch.randn(32, 4).double()
    model = DistributedDataParallel(net)
    if split:
        x, y = x.chunk(2)[rank], y.chunk(2)[rank]
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    optimizer.eval()
    return torch.cat([optimizer.last_step_size[None], *(p.detach().flatten() for p in net.parameters())])


for form in ("collapsed", "branches"):
    halves, whole = train(form, True), train(form, False)
    assert (halves - whole).abs().max() < 1e-6, form  # slopes are summed in float32
    both = [torch.empty_like(halves) for _ in range(2)]
    dist.all_gather(both, halves)
    assert torch.equal(*both), form
dist.barrier()  # who leaves first takes the connections of the other along
time.sleep(SETTLE)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_replicas_take_the_polyak_step_of_the_whole_batch(tmp_path):
    """Two processes with half a batch each stay equal bit for bit, and follow one that has all of it."""
    command = [sys.executable, "-W", "ignore", "-c", REPLICA]
    rendezvous = str(tmp_path / "rendezvous")
    runs = [
        subprocess.Popen([*command, str(rank), rendezvous], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
