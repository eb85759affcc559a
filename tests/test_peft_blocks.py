"""Fused weights: factors for blocks of rows named by an einops pattern, and for parameters no linear layer holds."""

import pytest
import torch
from einops import rearrange
from peft import PeftModel, get_peft_model
from peft_models import batch, blur, descent, logits, needs_peft, tiny
from tiny_models import relative
from torch import nn

import lowrank_geo
from lowrank_geo.geometry import to_dense as dense
from lowrank_geo.peft import FixedRankConfig
from lowrank_geo.peft.blocks import Blocks
from lowrank_geo.peft.layer import FixedRankLayer
from lowrank_geo.peft.parameter import ParamWrapper

PATTERNS = {
    "projections": ("(p d) n -> p d n", {"p": 3}, 3),
    "heads": ("(p h d) n -> (p h) d n", {"p": 3, "h": 2}, 6),
    "interleaved": ("(h p d) n -> p (h d) n", {"p": 3, "h": 2}, 3),
}
every_pattern = pytest.mark.parametrize("name", PATTERNS)


@every_pattern
def test_rows_and_outputs_are_split_and_joined_alike(name):
    pattern, sizes, count = PATTERNS[name]
    blocks, W, x = Blocks(pattern, sizes), torch.randn(12, 5), torch.randn(2, 4, 5)
    parts = blocks.split_rows(W)
    assert len(parts) == count
    assert torch.equal(blocks.join_rows(parts), W)
    outputs = torch.stack([x @ part.mT for part in parts])
    assert torch.allclose(blocks.join(outputs), x @ W.mT, atol=1e-6)


def gpt2(name, **changes):
    pattern, sizes, _ = PATTERNS[name]
    settings = dict(
        r=2, init="random", target_modules=["c_attn"], block_patterns={"c_attn": pattern}
    )
    return get_peft_model(
        tiny("decoder-conv1d"), FixedRankConfig(**settings, block_sizes=sizes, **changes)
    ).eval()


@needs_peft(0, 21, "loads nested names under another adapter name")
@every_pattern
def test_a_fused_projection_gets_a_triple_for_each_block(name, tmp_path):
    model, inputs = gpt2(name), batch("decoder-conv1d")
    pattern, sizes, count = PATTERNS[name]
    layer = next(m for m in model.modules() if isinstance(m, FixedRankLayer))
    triples = layer.triples("default")
    assert len(triples) == count and {t.rank for t in triples} == {2}
    parts = rearrange(layer.get_delta_weight("default").mT, pattern, **sizes)
    for part, triple in zip(parts, triples, strict=True):
        assert torch.allclose(part, dense(triple.point), atol=1e-6)
    blur(model)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny("decoder-conv1d"), tmp_path, adapter_name="other"
    ).eval()
    assert torch.equal(logits(loaded, inputs), expected)
    assert relative(logits(loaded.merge_and_unload(), inputs), expected) < 2e-6


@pytest.mark.parametrize("init", ["zero", "pissa"])
def test_blocks_start_at_the_model_and_train(init):
    inputs = batch("decoder-conv1d")
    settings = dict(r=2, init=init, target_modules=["c_attn"], block_sizes={"p": 3})
    config = FixedRankConfig(**settings, block_patterns={"c_attn": "(p d) n -> p d n"})
    model = get_peft_model(tiny("decoder-conv1d"), config)
    assert relative(logits(model, inputs), logits(tiny("decoder-conv1d"), inputs)) < 2e-6
    optimizer = lowrank_geo.optim.RiemannianMuon(lowrank_geo.param_groups(model, lr=0.02))
    losses = descent(model, optimizer, inputs, 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "pattern, sizes, reason",
    [
        ("(p d) n -> p d n", {"p": 5}, "pattern that fits a matrix of shape"),
        ("(p d) n -> (p d) n", {"p": 3}, "leaves the inputs whole"),
        ("(p d) n -> p n d", {"p": 3}, "leaves the inputs whole"),
        ("m (h n) -> h m n", {"h": 2}, "leaves the inputs whole"),
        ("p d n", {}, "leaves the inputs whole"),
    ],
)
def test_patterns_that_do_not_split_the_rows_are_refused(pattern, sizes, reason):
    config = FixedRankConfig(
        r=2, target_modules=["c_attn"], block_patterns={"c_attn": pattern}, block_sizes=sizes
    )
    model = tiny("decoder-conv1d")
    with pytest.raises(ValueError, match=f"`block_patterns` needs .*{reason}"):
        get_peft_model(model, config)
    assert not [m for m in model.modules() if isinstance(m, FixedRankLayer)]


class Experts(nn.Module):
    """Two fused weights of three experts, as in mixtures of experts, and a plain matrix."""

    def __init__(self, is_transposed=False):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((4, 6), (6, 4)) if is_transposed else ((6, 4), (4, 6))
        self.up, self.down = nn.Parameter(torch.randn(3, *up)), nn.Parameter(torch.randn(3, *down))
        self.mix = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return torch.relu(x @ up) @ down @ self.mix.mT


class Mixture(nn.Module):
    def __init__(self, is_transposed=False):
        super().__init__()
        torch.manual_seed(5)
        self.experts = Experts(is_transposed)

    def forward(self, x):
        return self.experts(x)


PARAMETERS = ["experts.up", "experts.down", "experts.mix"]


def mixture(is_transposed=False, **changes):
    settings = dict(r=2, init="random", target_modules=[], target_parameters=PARAMETERS)
    return get_peft_model(Mixture(is_transposed), FixedRankConfig(**settings | changes)).eval()


@pytest.mark.parametrize("is_transposed", [False, True])
def test_parameters_of_experts_are_adapted(is_transposed, tmp_path):
    x = torch.randn(2, 4)
    plain = Mixture(is_transposed)
    assert torch.equal(mixture(is_transposed, init="zero")(x), plain(x))
    model = mixture(is_transposed)
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert {w.parameter_name: len(w.triples("default")) for w in wrappers} == {
        "up": 3,
        "down": 3,
        "mix": 1,
    }
    with torch.no_grad():
        for wrapper in wrappers:
            getattr(plain.experts, wrapper.parameter_name).add_(wrapper.get_delta_weight("default"))
    assert relative(model(x), plain(x)) < 1e-6
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Mixture(is_transposed), tmp_path)
    assert torch.equal(loaded(x), model(x))
    with loaded.disable_adapter():
        assert torch.equal(loaded(x), Mixture(is_transposed)(x))
    loaded.merge_adapter()
    assert relative(loaded(x), model(x)) < 1e-6
    loaded.unmerge_adapter()
    merged = loaded.merge_and_unload()
    assert relative(merged(x), model(x)) < 1e-6
    assert merged.state_dict().keys() == plain.state_dict().keys()


@needs_peft(0, 20, "shares wrappers of parameters")
def test_a_second_adapter_of_parameters_shares_the_wrappers():
    x = torch.randn(2, 4)
    model = mixture()
    first = model(x)
    settings = dict(r=1, init="random", target_modules=[], target_parameters=PARAMETERS)
    model.add_adapter("other", FixedRankConfig(**settings))
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert len(wrappers) == 3 and torch.equal(model(x), first)
    model.set_adapter("other")
    assert not torch.equal(model(x), first)


def test_parameters_train_with_tangent_gradients():
    x, model = torch.randn(8, 4), mixture(init="zero").train()
    optimizer = lowrank_geo.optim.RiemannianAdam(lowrank_geo.param_groups(model, lr=0.05))
    losses = []
    for _ in range(10):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "changes", [dict(dropout=0.1), dict(init="pissa"), dict(init="gradient")], ids=str
)
def test_what_a_parameter_cannot_have_is_refused(changes):
    with pytest.raises(ValueError, match="fixed_rank.ParamWrapper does not work with"):
        mixture(**changes)


def test_mixed_adapters_on_parameters_are_refused():
    with pytest.raises(ValueError, match="ParamWrapper does not support mixed batch inference"):
        mixture()(torch.randn(2, 4), adapter_names=["default", "default"])
