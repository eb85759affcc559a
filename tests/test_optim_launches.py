"""How many operations a step calls: as many for a deep model as for a shallow one."""

import pytest
import torch
from optimizer_list import every_optimizer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lowrank_geo import LowRankLinear
from lowrank_geo.optim import param_groups

# One call each, whatever the number of tensors: what makes views, and what a device does without a launch.
VIEWS = ("detach", "unbind", "unsqueeze", "select", "as_strided", "alias", "expand", "view", "item")


def calls(make, depth, lr):
    """Names of the torch operations that one step calls itself; what those call is inside of them."""
    torch.manual_seed(0)
    net = nn.Sequential(*(LowRankLinear(12, 12, 3, bias=False) for _ in range(depth)))
    optimizer = make(param_groups(net))
    if lr == "tensor":
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            optimizer.step()
    tops = [e for e in found.events() if not e.cpu_parent or "::" not in e.cpu_parent.name]
    names = [e.name for e in tops if e.name.startswith("aten::")]
    return [name for name in names if name.removeprefix("aten::") not in VIEWS]


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("lr", [pytest.param("number", marks=pytest.mark.thorough), "tensor"])
@every_optimizer
def test_the_number_of_operations_does_not_depend_on_depth(make, lr):
    few, many = calls(make, 2, lr), calls(make, 5, lr)
    assert len(few) > 5 and few == many
