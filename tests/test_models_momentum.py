"""models.momentum: inversion bit for bit, the gradients of backpropagation, state put back, refusals."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lowrank_geo
from lowrank_geo.live_memory import peak_bytes
from lowrank_geo.models import MomentumStack, segments
from lowrank_geo.models.fixed_point import fixed_point
from lowrank_geo.models.segments import computed_again

DEPTHS = [(0.5, 1000), (0.9, 1000), (0.99, 1000), (0.5, 40), (0.9, 400)]


def tanh_blocks(depth: int, width: int = 8, dtype=torch.float64) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Tanh()) for _ in range(depth)]


def gradients(stack: MomentumStack, x: Tensor, *arguments) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y, v = stack.flow(x, torch.zeros_like(x), *arguments)
    wanted = [x, *stack.parameters()]
    return [y, *torch.autograd.grad((y * y.detach().cos() + v).sum(), wanted)]


def twins(blocks, gamma, x, *arguments) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of both modes, from the same bits of the generator."""
    found = []
    for mode in ("reversible", "backprop"):
        torch.manual_seed(1)
        stack = MomentumStack(copy.deepcopy(blocks), gamma, mode=mode, exact=True)
        found.append(gradients(stack, x, *arguments))
    return found[0], found[1]


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99, 2**-16, 1 - 2**-16])
def test_a_thousand_steps_are_undone_bit_for_bit(gamma):
    arithmetic = fixed_point(gamma)
    begin = arithmetic.start(torch.randn(50), torch.randn(50))
    pushes = torch.randint(-(2**34), 2**34, (1000, 50))
    state, kept = begin, []
    for index, push in enumerate(pushes):
        state, full = arithmetic.keep(state, index)
        kept += [] if full is None else [full]
        state = arithmetic.advance(state, push)
        assert 0 <= state.lost.min() and state.lost.max() < 2**47
    for index, push in reversed(list(enumerate(pushes))):
        state = arithmetic.resume(arithmetic.retreat(state, push), index, kept)
    assert all(torch.equal(a, b) for a, b in zip(state, begin, strict=True)) and not kept


@pytest.mark.parametrize("gamma, depth", DEPTHS)
def test_reversible_gradients_are_those_of_backprop_on_the_same_forward(gamma, depth):
    one, two = twins(tanh_blocks(depth), gamma, torch.randn(4, 8, dtype=torch.float64))
    assert torch.equal(one[0], two[0])
    assert max((a - b).norm() / b.norm() for a, b in zip(one, two, strict=True)) < 1e-10


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99, 1e-6, 1 - 1e-7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_segments_in_float64_have_the_gradients_of_backprop(gamma, dtype, tolerance):
    blocks, x, found = tanh_blocks(200, dtype=dtype), torch.randn(4, 8, dtype=dtype), []
    for mode in ("reversible", "backprop"):
        found.append(gradients(MomentumStack(blocks, gamma, mode=mode, exact=False), x))
    assert max((a - b).norm() / b.norm() for a, b in zip(*found, strict=True)) < tolerance


@pytest.mark.parametrize("gamma", [pytest.param(0.5, marks=pytest.mark.thorough), 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_segments_are_right_and_raise_no_false_alarm_at_depth_1000(gamma, dtype):
    blocks, x, found = tanh_blocks(1000, dtype=dtype), torch.randn(32, 8, dtype=dtype), []
    for mode in ("reversible", "backprop"):
        found.append(gradients(MomentumStack(blocks, gamma, mode=mode, exact=False), x)[1:])
    truth = found[1]
    if dtype is torch.float32:
        doubled = [copy.deepcopy(block).double() for block in blocks]
        truth = gradients(MomentumStack(doubled, gamma), x.double())[1:]

    def error(some: list[Tensor]) -> float:
        pairs = zip(some, truth, strict=True)
        return math.sqrt(sum((a - b).square().sum() for a, b in pairs) / sum_squares(truth))

    # Worst of 3 draws: 3.5e-10; in float32 a half of the error of backprop, which keeps x itself in float32.
    assert error(found[0]) < max(3e-9, 3 * error(found[1]))


def sum_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


def test_segments_are_halved_where_blocks_round_more_than_x_does(monkeypatch):
    halved = []

    def counted(*given):
        halved.append(given[2].before)
        return computed_again(*given)

    monkeypatch.setattr(segments, "computed_again", counted)
    blocks, found = [InFloat32() for _ in range(200)], []
    x = torch.randn(500, 8, dtype=torch.float64)
    for mode in ("reversible", "backprop"):
        found.append(gradients(MomentumStack(blocks, 0.9, mode=mode, exact=False), x))
    assert halved
    assert (
        max((a - b).norm() / b.norm() for a, b in zip(*found, strict=True)) < 1e-6
    )  # 0 in 3 draws


class InFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float()).tanh().double()


@pytest.mark.parametrize("exact", [True, False])
def test_layers_that_are_faster_without_gradients_raise_no_false_alarm(exact):
    layers = [
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(3)
    ]
    stack = MomentumStack(layers, mode="reversible", exact=exact).eval()
    x = torch.randn(2, 5, 16, requires_grad=True)
    stack(
        x
    ).square().sum().backward()  # the fused kernel of a forward without gradients has other bits
    assert x.grad.isfinite().all()


def test_a_weight_used_within_and_beside_a_stack_keeps_both_gradients_in_autocast():
    block, x, found = nn.Linear(8, 8), torch.randn(4, 8), []
    for mode in ("reversible", "backprop"):
        with torch.autocast("cpu", torch.bfloat16):
            y = MomentumStack([block] * 3, mode=mode)(x) + block(x)
        found.append(torch.autograd.grad(y.float().square().sum(), list(block.parameters())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_float64_segments_agree_with_backprop_in_bfloat16_autocast(gamma):
    blocks, x, found = tanh_blocks(100, dtype=torch.float32), torch.randn(16, 8), []
    for mode in ("reversible", "backprop"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = MomentumStack(blocks, gamma, mode=mode, exact=False)(x).square().sum()
        parameters = [p for block in blocks for p in block.parameters()]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_float32_gradients_agree_to_rounding(gamma):
    one, two = twins(tanh_blocks(100, dtype=torch.float32), gamma, torch.randn(4, 8))
    assert max((a - b).norm() / b.norm() for a, b in zip(one, two, strict=True)) < 1e-5


def test_plain_backprop_is_the_equation():
    blocks, x, v = tanh_blocks(5), torch.randn(3, 8, dtype=torch.float64), torch.tensor(0.0)
    found = MomentumStack(blocks, 0.7)(x)
    for block in blocks:
        v = 0.7 * v + (1 - 0.7) * block(x)
        x = x + v
    assert torch.equal(found, x)


def test_gamma_zero_is_the_residual_network():
    blocks, x = tanh_blocks(3), torch.randn(3, 8, dtype=torch.float64)
    found = MomentumStack(blocks, 0)(x)
    for block in blocks:
        x = x + block(x)
    torch.testing.assert_close(found, x, rtol=0, atol=0)


def test_dropout_and_batch_norm_are_as_in_one_pass():
    blocks = [
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.3))
        for _ in range(6)
    ]
    stacks = []
    for mode in ("reversible", "backprop"):
        torch.manual_seed(1)
        stack = MomentumStack(copy.deepcopy(blocks), 0.9, mode=mode, exact=True)
        stacks.append((gradients(stack, torch.ones(2, 3, 5, 5).cumsum(3)), stack, torch.rand(2)))
    (one, a, after), (two, b, wanted) = stacks
    for found, expected in zip(one, two, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(s, t) for s, t in zip(a.buffers(), b.buffers(), strict=True))
    assert torch.equal(after, wanted)  # backward leaves the generator as it was


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor, gate: Tensor, power: int) -> Tensor:
        return self.linear(x).tanh() * gate**power


def test_extra_arguments_and_shared_blocks_get_their_gradients():
    block, grads = Gated(), []
    for mode in ("reversible", "backprop"):
        gate = torch.arange(1.0, 5.0, dtype=torch.float64, requires_grad=True)
        stack = MomentumStack([block] * 7, 0.9, mode=mode, exact=True)
        y = stack(torch.ones(2, 4, dtype=torch.float64), gate * 0.3, 2)
        grads.append(torch.autograd.grad(y.square().sum(), [gate, *block.parameters()]))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_autocast_is_the_same_in_backward():
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        stack = MomentumStack(tanh_blocks(5, dtype=torch.float32), 0.9, mode="reversible")
        loss = stack(x).square().sum()
    loss.backward()  # other bits would be refused
    assert stack.blocks[0][0].weight.grad.isfinite().all()


class Counted(nn.Module):
    """Any statistics of its own, and InstanceNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(3, track_running_stats=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(x)


@pytest.mark.parametrize("exact", [True, False])
def test_buffers_of_any_kind_are_written_once(exact):
    stack = MomentumStack([Counted(), Counted()], mode="reversible", exact=exact)
    x = torch.randn(2, 3, 5, requires_grad=True)
    y = stack(x)
    before = [buffer.clone() for buffer in stack.buffers()]
    y.square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, stack.buffers(), strict=True))
    assert stack.blocks[0].calls == 1


def test_tensors_inside_arguments_and_keywords_get_their_gradients():
    class Scaled(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, int], *, shift: Tensor) -> Tensor:
            return (x * pair[0]).tanh() ** pair[1] + shift

    grads = []
    for mode in ("reversible", "backprop"):
        scale, shift = (torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in "ab")
        stack = MomentumStack([Scaled()] * 4, mode=mode, exact=True)
        y = stack(torch.ones(3, dtype=torch.float64), (scale, 2), shift=shift)
        grads.append(torch.stack(torch.autograd.grad(y.sum(), [scale, shift])))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leaf", [True, False])
def test_a_tensor_whose_gradient_would_be_lost_is_refused(leaf):
    weight = torch.ones(3, requires_grad=True)
    used = weight if leaf else weight * 2

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * used

    y = MomentumStack([Reads()], mode="reversible")(torch.ones(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="parameter or an argument, got another one of shape"):
        y.sum().backward()


def test_without_gradients_the_bits_are_the_same_and_no_activation_is_kept():
    stack, x = MomentumStack(tanh_blocks(200), 0.5, mode="reversible"), torch.randn(500, 8)
    x = x.double()
    with torch.no_grad():
        assert torch.equal(stack(x), stack(x.requires_grad_()))
        shallow = MomentumStack(tanh_blocks(50), 0.5, mode="reversible")
        assert peak_bytes(lambda: stack(x)) <= peak_bytes(lambda: shallow(x)) + 1024


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_backprop_mode_compiles_to_one_graph_with_the_same_gradients(gamma):
    stack, x = MomentumStack(tanh_blocks(4), gamma), torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    grads = []
    for net in (stack, compiled):
        grads.append(torch.autograd.grad(net(x).square().sum(), list(stack.parameters())))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# torch 2.13 reads .grad of the tensors at a break of the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_reversible_mode_runs_inside_a_compiled_model():
    net = nn.Sequential(
        nn.Linear(8, 8), MomentumStack(tanh_blocks(3, dtype=torch.float32), mode="reversible")
    )
    x, grads = torch.randn(3, 8), []
    for model in (net, torch.compile(net, backend="aot_eager")):
        grads.append(torch.autograd.grad(model(x).square().sum(), list(net.parameters())))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_low_rank_convolutions_are_reversible():
    net = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
    blocks = list(lowrank_geo.convert(net, rank=2))
    one, two = twins(blocks, 0.9, torch.randn(2, 8, 4, 4))
    for found, wanted in zip(one, two, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_peak_live_bytes_are_constant_but_for_the_lost_bits(gamma):
    peaks, x = {}, torch.randn(20000, requires_grad=True)
    for depth in (10, 300):
        stack = MomentumStack([Wave()] * depth, gamma, mode="reversible")
        peaks[depth] = peak_bytes(lambda stack=stack: stack(x).sum().backward())
    more = 8 * x.numel() * math.ceil(300 * math.log2(1 / gamma) / 44)
    checksums = 300 * 64  # bytes of a small tensor, whatever the size of x
    assert peaks[300] <= peaks[10] + more + checksums
    assert peaks[10] < 40 * 8 * x.numel()  # the constant


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("depth, rows", [(3, 0), (1, 2), (0, 2)])
def test_no_rows_one_block_and_none_at_all(exact, depth, rows):
    x, found = torch.randn(rows, 8, dtype=torch.float64), []
    blocks = tanh_blocks(depth)
    for mode in ("reversible", "backprop"):
        found.append(gradients(MomentumStack(blocks, mode=mode, exact=exact), x))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e12])
def test_values_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="finite values below"):
        MomentumStack([nn.Identity()], mode="reversible")(torch.tensor([1.0, bad]))


def test_growth_beyond_fixed_point_is_refused_and_never_wrapped():
    with pytest.raises(ValueError, match="finite values below"):
        MomentumStack([nn.Identity()] * 200, 0.5, mode="reversible")(torch.ones(3))


@pytest.mark.parametrize("exact, sentence", [(True, "block 1"), (False, "every block from 0 to 2")])
def test_a_block_changed_before_backward_is_detected(exact, sentence):
    stack = MomentumStack(tanh_blocks(3), mode="reversible", exact=exact)
    y = stack(torch.randn(2, 8, dtype=torch.float64)).sum()
    stack.blocks[1][0].weight.data.mul_(1.01)
    with pytest.raises(RuntimeError, match=f"needs {sentence} to give the same values twice"):
        y.backward()


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_refuses_gamma_outside_its_range(gamma):
    with pytest.raises(ValueError, match="0 <= gamma < 1"):
        MomentumStack([nn.Identity()], gamma)


def test_refuses_what_cannot_be_inverted():
    with pytest.raises(ValueError, match="gamma > 0 in reversible mode, got 0"):
        MomentumStack([nn.Identity()], 0, mode="reversible")
    with pytest.raises(ValueError, match="keep the shape"):
        MomentumStack([nn.Linear(4, 3)], mode="reversible")(torch.zeros(2, 4))
    with pytest.raises(TypeError, match="floating-point x, got torch.int64"):
        MomentumStack([nn.Identity()])(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "blocks, gamma, said",
    [
        (nn.Identity(), 0.9, "a list of blocks, got Identity"),
        (None, 0.9, "a list of blocks, got NoneType"),
        ([torch.tanh], 0.9, "blocks that are modules, got builtin_function_or_method"),
        ([nn.Identity()], "0.9", "a number as gamma, got '0.9'"),
        ([nn.Identity()], None, "a number as gamma, got None"),
        ([nn.Identity()], True, "a number as gamma, got True"),
    ],
)
def test_refuses_what_is_no_list_of_blocks_and_no_number(blocks, gamma, said):
    with pytest.raises(TypeError, match=said):
        MomentumStack(blocks, gamma)
