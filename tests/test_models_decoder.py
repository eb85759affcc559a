"""models.decoder: causality, the softmax oracle, initial scale, what torch does to it, refusals."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_geo.models.decoder import Attention, Decoder, DecoderConfig
from lowrank_geo.models.rope import rotation

CONFIG = DecoderConfig(vocab_size=50, width=24, layers=2, heads=2, hidden=40, context=12)


def plain_attention(module: Attention, x: torch.Tensor) -> torch.Tensor:
    """softmax(Q Kᵀ / √d) V head by head, with positions as complex numbers, one query at a time."""
    d = x.shape[-1] // module.heads
    position = torch.arange(x.shape[1], dtype=torch.float64)
    angle = position[:, None] * 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    turn = torch.polar(torch.ones_like(angle), angle)
    heads = []
    for h in range(module.heads):
        rows = slice(h * d, (h + 1) * d)
        Q, K, V = (x @ W.weight[rows].mT for W in (module.q, module.k, module.v))
        Q, K = (torch.complex(Z[..., : d // 2], Z[..., d // 2 :]) * turn for Z in (Q, K))
        queries = []
        for t in range(x.shape[1]):
            scores = (Q[:, t : t + 1] * K[:, : t + 1].conj()).real.sum(-1) / math.sqrt(d)
            queries.append((scores.softmax(-1)[..., None] * V[:, : t + 1]).sum(1))
        heads.append(torch.stack(queries, 1))
    return torch.cat(heads, -1) @ module.o.weight.mT


def test_attention_is_the_softmax_formula():
    module = Attention(CONFIG, layer=0).double()
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    result = module(x, rotation(0, 7, 12, theta=10000.0, like=x))
    assert torch.allclose(result, plain_attention(module, x), rtol=0, atol=1e-13)


def test_decoder_is_the_composition_of_its_named_parts():
    model = Decoder(CONFIG).double()
    tokens = torch.randint(50, (2, 9))

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    x = model.embed.weight[tokens]
    for block in model.blocks:
        x = x + plain_attention(block.attention, norm(x, block.norm1))
        y = norm(x, block.norm2)
        gate = y @ block.mlp.gate.weight.mT
        inside = gate * torch.sigmoid(gate) * (y @ block.mlp.up.weight.mT)
        x = x + inside @ block.mlp.down.weight.mT
    expected = norm(x, model.norm) @ model.lm_head.weight.mT
    assert torch.allclose(model(tokens), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", [0, 5, 11])
def test_a_later_token_does_not_change_earlier_logits(position):
    model, tokens = Decoder(CONFIG).double(), torch.randint(50, (2, 12))
    changed = tokens.clone()
    changed[:, position] = (tokens[:, position] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position] - after[:, position]).abs().max() > 1e-6


def test_earlier_tokens_reach_later_logits():
    model, tokens = Decoder(CONFIG).double(), torch.randint(50, (1, 6))
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % 50
    assert (model(tokens)[:, -1] - model(changed)[:, -1]).abs().max() > 1e-6


def test_gradients_reach_every_parameter():
    model, tokens = Decoder(CONFIG), torch.randint(50, (2, 8))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == []


def test_every_matrix_is_exactly_a_linear_without_bias():
    model = Decoder(CONFIG)
    matrices = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.dim() == 2}
    linear = {n for n, m in model.named_modules() if type(m) is nn.Linear and m.bias is None}
    assert matrices == linear | {"embed"}
    block = {"attention.q", "attention.k", "attention.v", "attention.o"}
    block |= {"mlp.gate", "mlp.up", "mlp.down"}
    assert linear == {f"blocks.{i}.{name}" for i in range(2) for name in block} | {"lm_head"}


@pytest.mark.parametrize("layers", [1, 12])
def test_the_stream_keeps_its_scale_at_any_depth(layers):
    model = Decoder(dataclasses.replace(CONFIG, width=64, hidden=128, layers=layers))
    seen = []
    model.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].square().mean().sqrt()))
    logits = model(torch.randint(50, (8, 12)))
    assert 1.0 < seen[0] < 1.6
    assert 0.5 < logits.std() < 1.5


def test_reset_parameters_makes_a_model_of_an_empty_one():
    model, expected = Decoder(CONFIG, device="meta").to_empty(device="cpu"), Decoder(CONFIG)
    for fresh in (model, expected):
        torch.manual_seed(3)
        fresh.reset_parameters()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_logits_equal_those_of_the_llama_of_transformers(tie):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=12, rms_norm_eps=1e-6, tie_word_embeddings=tie,
        initializer_range=0.2,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double()
    ours = Decoder(dataclasses.replace(CONFIG, tie_embeddings=tie)).double()
    names = {
        "model.embed_tokens": "embed", "model.layers": "blocks", "model.norm": "norm",
        "self_attn": "attention", "_proj": "", "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
    }  # fmt: skip
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    ours.load_state_dict(state)
    tokens = torch.randint(50, (2, 12))
    # 10 × the worst of 20 draws: their rotary table is float32 also in a float64 model.
    assert torch.allclose(ours(tokens), theirs(tokens).logits, rtol=0, atol=2e-5)


def test_tied_embeddings_are_one_parameter_also_in_a_copy():
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    model = copy.deepcopy(Decoder(config))
    untied = sum(p.numel() for p in Decoder(CONFIG).parameters())
    assert model.lm_head.weight is model.embed.weight
    assert sum(p.numel() for p in model.parameters()) == untied - 50 * 24


def test_compiles_without_graph_breaks():
    model, tokens = Decoder(CONFIG), torch.randint(50, (2, 8))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens), model(tokens))


def test_bfloat16_and_autocast_stay_close_to_float32():
    model, tokens = Decoder(CONFIG), torch.randint(50, (2, 12))
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(tokens)
    assert autocast.dtype == torch.bfloat16
    assert (autocast - expected).norm() < 0.05 * expected.norm()
    model.bfloat16()
    assert (model(tokens) - expected).norm() < 0.05 * expected.norm()


def test_an_empty_batch_or_sequence_has_empty_logits():
    model = Decoder(CONFIG)
    for shape in ((0, 5), (2, 0)):
        assert model(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 50)


def test_refuses_a_sequence_longer_than_the_context():
    with pytest.raises(ValueError, match="Decoder needs at most 12 tokens, got 13; shorten"):
        Decoder(CONFIG)(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("tokens", [torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4)], ids=str)
def test_refuses_what_is_no_batch_of_token_ids(tokens):
    with pytest.raises(ValueError, match=r"integer tokens of shape \(B, T\), got"):
        Decoder(CONFIG)(tokens)


@pytest.mark.parametrize(
    "changes, error, sentence",
    [
        ({"width": 25}, ValueError, "width divisible by heads, got width 25 and 2 heads"),
        ({"width": 6}, ValueError, "even width per head for rotary positions, got 6 / 2 = 3"),
        ({"layers": 0}, ValueError, "layers >= 1, got 0"),
        ({"context": "12"}, TypeError, "integer context, got '12'"),
        ({"heads": True}, TypeError, "integer heads, got True"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings to be True or False, got 1"),
        ({"norm_eps": float("nan")}, ValueError, "finite norm_eps >= 0, got nan"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta > 0, got 0.0"),
        ({"rope_theta": None}, TypeError, "a number as rope_theta, got None"),
    ],
    ids=str,
)
def test_refuses_sizes_that_make_no_model(changes, error, sentence):
    with pytest.raises(error, match=f"DecoderConfig needs .*{sentence}.*; "):
        dataclasses.replace(CONFIG, **changes)


def test_the_config_survives_a_dict():
    assert DecoderConfig(**dataclasses.asdict(CONFIG)) == CONFIG
