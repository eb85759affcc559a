"""models.mlp, vit, vgg, resnet: shapes, counts, gradients everywhere, exact layer types, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_geo.convert import convert
from lowrank_geo.models import MLP, VGG, ResNet, VGGConfig, ViT, ViTConfig, vgg11, vgg16
from lowrank_geo.models.resnet import Block
from lowrank_geo.models.vit import Attention
from lowrank_geo.plan import plan_ranks

VIT = ViTConfig(
    image_size=8, patch=4, channels=1, classes=5, width=12, layers=2, heads=3, hidden=20
)
MODELS = {
    "mlp": (lambda: MLP([64, 20, 20, 5]), (6, 1, 8, 8)),
    "vit": (lambda: ViT(VIT), (6, 1, 8, 8)),
    "vgg11": (lambda: vgg11(classes=5, pool=1, hidden=20), (6, 3, 32, 32)),
    "vgg11-bn": (lambda: vgg11(classes=5, pool=1, hidden=20, batch_norm=True), (6, 3, 32, 32)),
    "resnet20": (lambda: ResNet(20, classes=5, channels=1, width=4), (6, 1, 8, 8)),
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name):
    build, shape = MODELS[name]
    model = build()
    scores = model(torch.randn(shape))
    assert scores.shape == (6, 5)
    F.cross_entropy(scores, torch.arange(6) % 5).backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert silent == set()


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_exactly_a_linear_or_a_convolution(name):
    model = MODELS[name][0]()
    exact = {n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    weights = {n for n, p in model.named_parameters() if p.dim() > 1} - {"position"}
    assert {name.removesuffix(".weight") for name in weights} == exact


@pytest.mark.parametrize("name", MODELS)
def test_converts_to_the_size_of_the_plan_and_still_runs(name):
    build, shape = MODELS[name]
    model = build()
    dense = count(model)
    plan = plan_ranks(model, ratio=0.25, init="orthogonal")
    assert plan.dense_parameters == dense
    convert(model, plan)
    assert count(model) == plan.parameters < dense
    assert model(torch.randn(shape)).shape == (6, 5)


@pytest.mark.parametrize("name", MODELS)
def test_initial_scores_are_neither_dead_nor_huge(name):
    build, shape = MODELS[name]
    scores = build()(torch.randn(shape))
    assert 0.05 < scores.std() < 20


def test_vit_attention_is_the_softmax_formula():
    module = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    heads = []
    for h in range(3):
        Q, K, V = (f(x)[..., 4 * h : 4 * h + 4] for f in (module.q, module.k, module.v))
        heads.append((Q @ K.mT / math.sqrt(4)).softmax(-1) @ V)
    assert torch.allclose(module(x), module.o(torch.cat(heads, -1)), rtol=0, atol=1e-13)


def test_vit_reads_patches_in_the_order_of_unfold():
    model = ViT(ViTConfig(image_size=8, patch=4, width=12, layers=1, heads=3, hidden=20))
    images = torch.randn(2, 3, 8, 8)
    seen = []
    model.embed.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(images)
    assert torch.equal(seen[0], F.unfold(images, 4, stride=4).mT)


def test_a_silent_resnet_block_passes_on_every_second_pixel_and_zero_channels():
    block = Block(2, 4, stride=2)
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(3, 2, 5, 6)
    y = block(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert y[:, [0, 3]].count_nonzero() == 0


@pytest.mark.parametrize("depth, batch_norm, published", [
    (11, False, 128_807_306), (16, False, 134_301_514), (16, True, 134_309_962),
])  # fmt: skip
def test_vgg_has_the_parameters_of_torchvision(depth, batch_norm, published):
    with torch.device("meta"):
        assert count(VGG(VGGConfig(depth=depth, batch_norm=batch_norm))) == published


def test_vgg16_has_the_parameter_names_of_torchvision():
    with torch.device("meta"):
        model = vgg16(classes=1000)
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    layers = [f"features.{i}" for i in convolutions] + [f"classifier.{i}" for i in (0, 3, 6)]
    assert list(model.state_dict()) == [f"{n}.{k}" for n in layers for k in ("weight", "bias")]
    assert model.classifier[0].weight.shape == (4096, 25088)


@pytest.mark.parametrize("size", [32, 50, 224])
def test_vgg_reads_small_and_large_images(size):
    with torch.device("meta"):
        assert vgg16()(torch.empty(2, 3, size, size)).shape == (2, 10)


# He et al., table 6, rounded there to 0.27, 0.46, 0.66 and 0.85 M.
@pytest.mark.parametrize("depth, published", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_resnet_has_the_parameters_of_the_paper(depth, published):
    n = (depth - 2) // 6
    convolutions = 9 * (3 * 16 + 16 * 16 * 2 * n + 16 * 32 + 32 * 64)
    convolutions += 9 * (32 * 32 + 64 * 64) * (2 * n - 1)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    total = count(ResNet(depth))
    assert total == convolutions + norms + 64 * 10 + 10
    assert round(total / 1e6, 2) == published


def test_resnet_halves_the_image_twice_and_reads_odd_sizes():
    model = ResNet(8, channels=1, width=4)
    seen = []
    model.blocks[-1].register_forward_hook(lambda _, __, y: seen.append(y.shape))
    model(torch.randn(2, 1, 13, 10))
    assert seen == [(2, 16, 4, 3)]


def test_mlp_is_the_formula():
    model = MLP([3, 4, 2]).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    first, last = model.layers
    inside = (x @ first.weight.mT + first.bias).clamp_min(0)
    assert torch.allclose(model(x), inside @ last.weight.mT + last.bias, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "build, shape, sentence",
    [
        (MODELS["vit"][0], (2, 1, 8, 9), r"ViT needs images of shape \(B, 1, 8, 8\), got \(2, 1, 8, 9\); "),
        (MODELS["vit"][0], (2, 3, 8, 8), r"ViT needs images of shape \(B, 1, 8, 8\), got \(2, 3, 8, 8\); "),
        (MODELS["vgg11"][0], (1, 3, 31, 64), r"VGG needs images .* H, W >= 32, got \(1, 3, 31, 64\); "),
        (MODELS["resnet20"][0], (1, 8, 8), r"ResNet needs images .* H, W >= 4, got \(1, 8, 8\); "),
        (MODELS["mlp"][0], (2, 63), r"MLP needs 64 numbers per sample, got a batch of shape \(2, 63\); "),
    ],
    ids=["vit side", "vit channels", "vgg small", "resnet no batch", "mlp size"],
)  # fmt: skip
def test_refuses_images_that_do_not_fit(build, shape, sentence):
    with torch.device("meta"), pytest.raises(ValueError, match=sentence):
        build()(torch.empty(shape))


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: ViTConfig(width=100, heads=3), "width divisible by heads, got width 100 and 3"),
        (lambda: ViTConfig(image_size=30), "image_size divisible by patch, got 30 and 4"),
        (lambda: VGGConfig(depth=13), "VGGConfig needs depth 11 or 16, got 13"),
        (lambda: VGGConfig(dropout=1.0), "dropout below 1, got 1.0"),
        (lambda: VGGConfig(dropout=-0.5), "finite dropout >= 0, got -0.5"),
        (lambda: vgg16(classes=0), "classes >= 1, got 0"),
        (lambda: ResNet(18), r"ResNet needs a depth of 6n \+ 2 such as .*, got 18"),
        (lambda: ResNet(20, width=0), "ResNet needs width >= 1, got 0"),
        (lambda: MLP([4]), r"MLP needs at least two widths.*, got \[4\]"),
        (lambda: MLP([4, 0]), r"MLP needs widths\[1\] >= 1, got 0"),
    ],
    ids=["heads", "patch", "depth", "dropout", "negative", "classes", "6n+2", "width", "one", "zero"],
)  # fmt: skip
def test_refuses_sizes_that_make_no_model(build, sentence):
    with pytest.raises(ValueError, match=f"{sentence}.*; "):
        build()
