"""models.unet, momentum_classifier, bottleneck: shapes, γ = 0, both modes alike, low rank, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_geo
from lowrank_geo.models import MomentumClassifier, MomentumStack, MomentumUNet
from lowrank_geo.models.bottleneck import ResidualTransformer
from lowrank_geo.models.residual import Momentum

SMALL = {"width": 4, "depth": 2, "blocks": 2}
MODELS = {
    "unet": lambda **more: MomentumUNet(**SMALL, **more),
    "transformer": lambda **more: MomentumUNet(**SMALL, bottleneck="transformer", **more),
    "classifier": lambda **more: MomentumClassifier(**SMALL, **more),
}


def images() -> torch.Tensor:
    return torch.randn(3, 1, 13, 18)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 1, 13, 18), (2, 1, 4, 5)])
def test_a_mask_has_the_size_of_its_image(shape):
    assert MomentumUNet(classes=3, **SMALL)(torch.randn(shape)).shape == (2, 3, *shape[2:])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name):
    model = MODELS[name]()
    model(images()).square().sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert silent == set()


@pytest.mark.parametrize("name", MODELS)
def test_without_momentum_it_is_the_residual_network(name, monkeypatch):
    model, x = MODELS[name](gamma=0.0).double().eval(), images().double()

    def residual(stack: MomentumStack, y: torch.Tensor) -> torch.Tensor:
        for block in stack.blocks:
            y = y + block(y)
        return y

    found = model(x)
    monkeypatch.setattr(MomentumStack, "forward", residual)
    torch.testing.assert_close(found, model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_reversible_stages_give_the_gradients_of_backprop(name):
    one = MODELS[name](mode="reversible").double()
    two = copy.deepcopy(one)
    for module in two.modules():
        if isinstance(module, MomentumStack):
            module.mode = "backprop"  # and exact still
    x, grads = images().double(), []
    for model in (one, two):
        y = model(x)
        grads.append([y, *torch.autograd.grad(y.cos().sum(), list(model.parameters()))])
    assert torch.equal(grads[0][0], grads[1][0])
    for found, wanted in zip(*grads, strict=True):
        assert (found - wanted).norm() <= 1e-10 * wanted.norm()


@pytest.mark.parametrize("name", MODELS)
def test_exact_arithmetic_changes_the_output_by_rounding_only(name):
    plain, x = MODELS[name]().double().eval(), images().double()
    exact = MODELS[name](mode="reversible").double().eval()
    exact.load_state_dict(plain.state_dict())
    torch.testing.assert_close(exact(x), plain(x), rtol=0, atol=1e-3)  # γ is rounded to 2⁻¹⁶


def test_the_transformer_mixes_all_patches_and_is_added():
    mix = ResidualTransformer(8, Momentum(0.9, "backprop"), patch=2).double()
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(mix(x)[..., 0, 0].sum(), x)
    assert (g != 0).all()
    nn.init.zeros_(mix.back.weight), nn.init.zeros_(mix.back.bias)
    assert torch.equal(mix(x), x)


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_network_becomes_low_rank_within_a_budget(name):
    model = MODELS[name]()
    dense = sum(p.numel() for p in model.parameters())
    lowrank_geo.convert(model, budget=0.5)
    assert sum(p.numel() for p in model.parameters()) <= 0.5 * dense
    kinds = {type(layer) for _, layer in lowrank_geo.lowrank_layers(model)}
    assert lowrank_geo.LowRankConv2d in kinds
    assert model(images()).isfinite().all()


def test_a_low_rank_network_learns_to_segment_a_bright_disc():
    torch.manual_seed(0)
    rows, cols = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centres = torch.randint(4, 12, (16, 2, 1, 1))
    masks = ((rows - centres[:, 0]).square() + (cols - centres[:, 1]).square() < 12).long()
    x = masks[:, None] + 0.5 * torch.randn(16, 1, 16, 16)
    model = lowrank_geo.convert(MomentumUNet(mode="reversible", **SMALL), budget=0.6)
    groups = lowrank_geo.param_groups(model)
    optimizer = lowrank_geo.optim.RiemannianAdam(groups, lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), masks)
        loss.backward()
        optimizer.step()
    wrong = (model(x).argmax(1) != masks).double().mean()
    assert wrong < 0.3 * masks.double().mean()  # all background is wrong on all of the discs


@pytest.mark.parametrize("build", [MomentumUNet, MomentumClassifier])
@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"width": 0}, "width >= 1, got 0"),
        ({"gamma": 1.0}, "0 <= gamma < 1, got 1.0"),
        ({"gamma": 0.0, "mode": "reversible"}, "gamma > 0 in reversible mode, got 0.0"),
        ({"mode": "forward"}, 'mode "backprop" or "reversible"'),
    ],
    ids=["width", "gamma", "reversible", "mode"],
)
def test_refuses_what_makes_no_network(build, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**{**SMALL, **wrong})


@pytest.mark.parametrize("build", [MomentumUNet, MomentumClassifier])
def test_refuses_images_of_other_channels_or_too_small(build):
    for shape in [(2, 3, 16, 16), (2, 1, 3, 16), (1, 16, 16)]:
        with pytest.raises(
            ValueError, match=rf"{build.__name__} needs images of shape \(B, 1, H, W\)"
        ):
            build(**SMALL)(torch.zeros(shape))


def test_refuses_a_bottleneck_of_another_kind():
    with pytest.raises(ValueError, match='"convolution" or "transformer", got \'lstm\''):
        MomentumUNet(bottleneck="lstm")
