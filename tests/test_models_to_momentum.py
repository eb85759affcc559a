"""models.to_momentum: a torchvision-like ResNet, our ResNet, ViT and decoder; γ = 0 changes nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank_geo
from lowrank_geo.models import (
    Decoder,
    DecoderConfig,
    MomentumStack,
    ResNet,
    ViT,
    ViTConfig,
    to_momentum,
)


class Bottleneck(nn.Module):
    """As torchvision's: in-place ReLU after the sum, a projection on the shortcut where the shape changes."""

    def __init__(self, width: int, inner: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, 2 * inner, 1, bias=False), nn.BatchNorm2d(2 * inner)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or width != 2 * inner:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, 2 * inner, 1, stride, bias=False), nn.BatchNorm2d(2 * inner)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class TorchvisionLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Bottleneck(4, 4), Bottleneck(8, 4), Bottleneck(8, 4))
        self.layer2 = nn.Sequential(Bottleneck(8, 8, 2), Bottleneck(16, 8), Bottleneck(16, 8))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


VIT = ViTConfig(image_size=8, patch=4, width=12, layers=4, heads=3, hidden=20)
TOKENS = DecoderConfig(vocab_size=11, width=12, layers=4, heads=3, hidden=20, context=9)
MODELS = {
    "torchvision": (TorchvisionLike, lambda: torch.randn(3, 3, 8, 8, dtype=torch.float64)),
    "resnet": (lambda: ResNet(20, width=4), lambda: torch.randn(3, 3, 8, 8, dtype=torch.float64)),
    "vit": (lambda: ViT(VIT), lambda: torch.randn(3, 3, 8, 8, dtype=torch.float64)),
    "decoder": (lambda: Decoder(TOKENS), lambda: torch.randint(11, (3, 9))),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, draw = MODELS[name]
    return build().double(), draw()


def stacks(model: nn.Module) -> list[MomentumStack]:
    return [m for m in model.modules() if isinstance(m, MomentumStack)]


@every_model
def test_without_momentum_nothing_changes(name):
    model, x = make(name)
    wanted = model(x)
    found = to_momentum(copy.deepcopy(model), 0.0)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@every_model
def test_parameters_stay_and_momentum_changes_the_output(name):
    model, x = make(name)
    wanted, before = model(x), list(model.parameters())
    changed = to_momentum(model, 0.9)
    assert changed is model
    assert {id(p) for p in before} == {id(p) for p in model.parameters()}
    assert (model(x) - wanted).norm() > 1e-3 * wanted.norm()


@every_model
def test_reversible_gradients_are_those_of_backprop(name):
    one, x = make(name)
    two = to_momentum(copy.deepcopy(one), 0.9, mode="reversible")
    to_momentum(one, 0.9, mode="reversible")
    for stack in stacks(two):
        stack.mode = "backprop"
    grads = []
    for model in (one, two):
        grads.append(torch.autograd.grad(model(x).cos().sum(), list(model.parameters())))
    for found, wanted in zip(*grads, strict=True):
        assert (found - wanted).norm() <= 1e-10 * wanted.norm() + 1e-14


@every_model
def test_a_momentum_network_becomes_low_rank(name):
    model, x = make(name)
    lowrank_geo.convert(to_momentum(model, 0.9, mode="reversible"), ratio=0.4)
    assert any(".blocks." in layer for layer, _ in lowrank_geo.lowrank_layers(model))
    model(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["torchvision", "resnet"])
def test_a_low_rank_network_gets_momentum_in_the_same_places(name):
    dense, _ = make(name)
    low = to_momentum(lowrank_geo.convert(copy.deepcopy(dense), ratio=0.4))
    assert [len(s.blocks) for s in stacks(low)] == [
        len(s.blocks) for s in stacks(to_momentum(dense))
    ]


def test_blocks_that_resize_stay():
    model = to_momentum(TorchvisionLike())
    kinds = [[type(part).__name__ for part in stage] for stage in (model.layer1, model.layer2)]
    assert kinds == [["Bottleneck", "MomentumStack"]] * 2


def test_the_momentum_decoder_generates_with_its_cache():
    model = to_momentum(Decoder(TOKENS)).double().eval()
    tokens = torch.randint(11, (2, 6))
    cache = model.new_cache()
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in tokens.split([4, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-10, atol=1e-10)


def test_other_lists_are_named():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    to_momentum(model, stages=["body"])
    assert isinstance(model["body"][0], MomentumStack)


@pytest.mark.parametrize(
    "stages, sentence",
    [(None, "got none; name the lists"), (["no"], "got 'no'"), (["0"], "got Linear")],
)
def test_refuses_a_model_without_such_stages(stages, sentence):
    with pytest.raises(ValueError, match=f"to_momentum needs .*{sentence}"):
        to_momentum(nn.Sequential(nn.Linear(4, 4)), stages=stages)


def test_a_second_call_finds_nothing_to_change():
    with pytest.raises(ValueError, match="got none"):
        to_momentum(to_momentum(TorchvisionLike()))


@pytest.mark.parametrize("gamma, mode", [(1.0, "backprop"), (0.0, "reversible")])
def test_a_refused_gamma_leaves_the_model_as_it_was(gamma, mode):
    model = TorchvisionLike()
    with pytest.raises(ValueError, match="MomentumStack needs"):
        to_momentum(model, gamma, mode=mode)
    assert not stacks(model) and len(model.layer1) == 3
