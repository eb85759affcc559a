"""models: momentum in networks that exist, and velocities in few coordinates."""

import pytest
import torch
from torch import nn

from lowrank_geo.models import (
    Decoder,
    DecoderConfig,
    MomentumStack,
    ResNet,
    ViT,
    ViTConfig,
    to_momentum,
)
from lowrank_geo.models.shared_range import SharedRangeStack


class BasicBlock(nn.Module):
    """A residual block with torchvision's names."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.downsample = stride, None
        if stride != 1 or inside != outside:
            self.downsample = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class TorchvisionLike(nn.Module):
    """ResNet-18's layout, small."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2), BasicBlock(8, 8), BasicBlock(8, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


def decoder():
    return Decoder(DecoderConfig(11, 16, 2, 2, 24, 8))


NETWORKS = {
    "torchvision": (TorchvisionLike, torch.randn(2, 3, 8, 8)),
    "resnet": (lambda: ResNet(20, width=4), torch.randn(2, 3, 8, 8)),
    "vit": (
        lambda: ViT(ViTConfig(image_size=8, width=16, layers=3, heads=2, hidden=32)),
        torch.randn(2, 3, 8, 8),
    ),
    "decoder": (decoder, torch.randint(11, (2, 6))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gamma_zero_leaves_what_an_existing_network_computes(name):
    build, x = NETWORKS[name]
    model = build().eval()
    before = model(x)
    parameters = {id(p) for p in model.parameters()}
    assert to_momentum(model, 0.0) is model
    assert {id(p) for p in model.parameters()} == parameters
    assert (model(x) - before).abs().max() < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_has_momentum_and_trains(name):
    build, x = NETWORKS[name]
    model = build()
    before = model.eval()(x)
    to_momentum(model, 0.9)
    stacks = [m for m in model.modules() if isinstance(m, MomentumStack)]
    assert stacks and all(stack.gamma == 0.9 for stack in stacks)
    assert (model(x) - before).abs().max() > 1e-4
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_conversion_keeps_blocks_that_change_the_shape():
    model = to_momentum(TorchvisionLike(), 0.9)
    kinds = [[type(m).__name__ for m in stage] for stage in (model.layer1, model.layer2)]
    assert kinds == [["MomentumStack"], ["BasicBlock", "MomentumStack"]]


@pytest.mark.parametrize(
    "stages, message",
    [
        (["layer9"], "got 'layer9', which it has not"),
        (["conv1"], "got 'conv1', a Conv2d"),
        (["layer1", "layer9"], "layer9"),
    ],
)
def test_conversion_refuses_other_stages_and_changes_nothing(stages, message):
    model = TorchvisionLike()
    with pytest.raises(ValueError, match=message):
        to_momentum(model, 0.9, stages=stages)
    assert not any(isinstance(m, MomentumStack) for m in model.modules())


def test_conversion_refuses_a_model_without_stages():
    with pytest.raises(ValueError, match="stages called layer1"):
        to_momentum(nn.Linear(2, 2), 0.9)


def test_a_shared_range_keeps_the_velocity_in_its_coordinates():
    d, r, gamma = 12, 3, 0.8
    blocks = [nn.Sequential(nn.Linear(d, 7), nn.Tanh(), nn.Linear(7, r)) for _ in range(5)]
    frame = nn.Linear(r, d, bias=False)
    stack = SharedRangeStack(blocks, frame, gamma).double()
    whole = MomentumStack([nn.Sequential(g, frame) for g in blocks], gamma).double()
    x = torch.randn(6, d, dtype=torch.float64)
    (ours, z), (theirs, v) = stack.flow(x), whole.flow(x, torch.zeros_like(x))
    assert z.shape == (6, r)
    assert (ours - theirs).abs().max() < 1e-13 and (frame(z) - v).abs().max() < 1e-13
    again, _ = stack.flow(*stack.flow(x))
    assert (again - whole.flow(*whole.flow(x, torch.zeros_like(x)))[0]).abs().max() < 1e-12


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: to_momentum(TorchvisionLike(), 1.0), "gamma < 1, got 1.0"),
        (lambda: SharedRangeStack([], nn.Identity()), "at least one block"),
        (
            lambda: SharedRangeStack([nn.Linear(4, 2), nn.Linear(4, 3)], nn.Linear(2, 4))(
                torch.zeros(1, 4)
            ),
            "same coordinates",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
