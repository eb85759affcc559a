"""Steps multiply float32 in float32, whatever autocast and torch's settings let layers do."""

import pytest
import torch
from optimizer_list import Net, backward, every_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_geo.optim import RiemannianMuon, ScheduleFree, param_groups
from lowrank_geo.precision import full_precision, rounds_products

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def data():
    return torch.randn(5, 8), torch.randn(5, 4)


@pytest.fixture(params=["legacy", "newer"])
def tf32(request):
    """A user who lets torch round float32 products, in one of torch's two ways."""
    if request.param == "newer":
        MATMUL.fp32_precision = "tf32"
        yield
        MATMUL.fp32_precision = "none"
        return
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


class Settings(TorchDispatchMode):
    """The precision that a GPU would use in every product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.seen.add(MATMUL.fp32_precision)
        return func(*args, **(kwargs or {}))


@every_optimizer
def test_a_step_inside_of_autocast_is_the_step_outside(make, data):
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        net = Net()
        optimizer = make(param_groups(net))
        for _ in range(2):
            backward(net, data)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
        found.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@every_optimizer
def test_a_step_takes_no_product_in_tf32(make, data, tf32):
    net = Net()
    optimizer = make(param_groups(net))
    backward(net, data)
    with Settings() as found:
        optimizer.step()
    assert found.seen and "tf32" not in found.seen
    assert MATMUL.fp32_precision == "tf32" and rounds_products()


def test_averages_take_no_product_in_tf32(data, tf32):
    net = Net()
    optimizer = ScheduleFree(RiemannianMuon(param_groups(net), lr=0.01))
    optimizer.train()
    backward(net, data)
    with Settings() as found:
        optimizer.step()
        optimizer.eval()
    assert found.seen and "tf32" not in found.seen


def test_a_closure_keeps_the_setting_of_the_user(data, tf32):
    net = Net()
    optimizer, seen = RiemannianMuon(param_groups(net)), []

    def closure():
        seen.append(rounds_products())
        return backward(net, data)

    optimizer.step(closure)
    assert seen == [True]


def test_the_setting_comes_back_after_an_error(tf32):
    with pytest.raises(KeyError), full_precision():
        assert not rounds_products()
        raise KeyError
    assert rounds_products()


def test_by_default_nothing_is_rounded():
    assert not rounds_products()
