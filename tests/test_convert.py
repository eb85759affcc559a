"""convert, to_dense, to_factors: the same function before and after, everything else about the layer kept."""

import copy
import json

import pytest
import torch
from torch import nn

from lowrank_geo.candidates import find_candidates
from lowrank_geo.convert import convert, to_dense, to_factors
from lowrank_geo.layers import LowRankConv2d, LowRankLinear, lowrank_layers
from lowrank_geo.plan import Plan, plan_ranks
from lowrank_geo.replacement import TwoFactors

TOL = {torch.float64: 2e-13, torch.float32: 1e-4}  # over 10 x the worst of 20 draws, relative


def truncate(weight, rank):
    """Make a weight have exactly this rank."""
    with torch.no_grad():
        U, sigma, Vt = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        weight.copy_(((U[:, :rank] * sigma[:rank]) @ Vt[:rank]).reshape(weight.shape))


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(24, 16)


LAYERS = {
    "linear": (lambda: nn.Linear(16, 24), (3, 5, 16)),
    "no bias": (lambda: nn.Linear(16, 24, bias=False), (2, 16)),
    "conv1d": (conv1d, (3, 5, 16)),
    "conv2d": (lambda: nn.Conv2d(5, 24, 3, stride=2, padding=(1, 0), dilation=2), (2, 5, 12, 11)),
    "same": (lambda: nn.Conv2d(5, 24, (4, 3), padding="same", bias=False), (2, 5, 9, 8)),
    "reflect": (lambda: nn.Conv2d(5, 24, 3, padding=2, padding_mode="reflect"), (2, 5, 9, 8)),
    "pointwise": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 3, 3)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    """A dense layer in float64 of rank 4, and an input for it."""
    build, shape = LAYERS[request.param]
    dense = build().double()
    truncate(dense.weight, 4)
    return dense, torch.randn(shape, dtype=torch.float64)


def test_weight_of_the_rank_of_the_plan_gives_the_same_function(layer):
    dense, x = layer
    model = convert(nn.Sequential(copy.deepcopy(dense)), rank=4)
    assert relative(model(x), dense(x)) < TOL[torch.float64]
    assert model.lowrank_plan.entries[0].error < 1e-14


@pytest.mark.parametrize("back", [to_dense, to_factors])
def test_way_back_computes_the_same_without_our_layers(layer, back):
    dense, x = layer
    model = convert(nn.Sequential(copy.deepcopy(dense)), rank=3)
    wanted = model(x)
    assert back(model) is model and not list(lowrank_layers(model))
    assert relative(model(x), wanted) < TOL[torch.float64]
    assert not hasattr(model, "lowrank_plan")


def test_to_dense_restores_type_names_and_settings(layer):
    dense, _ = layer
    model = to_dense(convert(nn.Sequential(copy.deepcopy(dense)), rank=4))
    assert type(model[0]) is type(dense)
    assert {k: v.shape for k, v in model[0].state_dict().items()} == {
        k: v.shape for k, v in dense.state_dict().items()
    }
    if isinstance(dense, nn.Conv2d):
        for name in ("stride", "dilation", "padding_mode", "kernel_size", "padding"):
            assert getattr(model[0], name) == getattr(dense, name)


def test_to_factors_is_two_layers_whose_weight_can_be_read(layer):
    dense, _ = layer
    pair = to_factors(convert(nn.Sequential(copy.deepcopy(dense)), rank=4))[0]
    assert isinstance(pair, TwoFactors) and len(pair) == 2 and pair[0].bias is None
    assert relative(pair.weight, dense.weight) < TOL[torch.float64]
    assert (pair.bias is None) == (dense.bias is None)


def test_error_in_the_plan_is_that_of_the_best_approximation():
    dense = nn.Linear(20, 30).double()
    sigma = torch.linalg.svdvals(dense.weight)
    model = convert(nn.Sequential(dense), rank=5)
    wanted = (sigma[5:].square().sum() / sigma.square().sum()).sqrt().item()
    assert model.lowrank_plan.entries[0].error == pytest.approx(wanted, rel=1e-12)


def test_spectral_keeps_the_norm_and_orthogonal_the_flat_spectrum():
    dense = nn.Linear(20, 30).double()
    for init in ("spectral", "orthogonal"):
        model = convert(nn.Sequential(copy.deepcopy(dense)), rank=5, init=init)
        assert relative(model[0].weight.norm(), dense.weight.norm()) < 1e-12
        assert model.lowrank_plan.init == init
    assert torch.linalg.cond(model[0].S) < 1 + 1e-12


def test_zero_weight_has_error_zero():
    dense = nn.Linear(8, 8)
    nn.init.zeros_(dense.weight)
    assert convert(nn.Sequential(dense), rank=2).lowrank_plan.entries[0].error == 0


def test_keeps_names_bias_mode_and_frozen_weights():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    model[0].weight.requires_grad_(False)
    biases = [layer.bias for layer in model]
    convert(model, rank=3)
    assert [name for name, _ in lowrank_layers(model)] == ["0", "1"]
    assert all(layer.bias is bias for layer, bias in zip(model, biases, strict=True))
    assert not any(p.requires_grad for p in model[0].point) and model[0].bias.requires_grad
    assert all(p.requires_grad for p in model[1].point)
    assert not model[0].training
    to_dense(model)
    assert not model[0].weight.requires_grad and model[1].weight.requires_grad
    assert not model[0].training and model[1].bias is biases[1]


@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_float32_and_the_way_back_has_the_dtype_of_the_model(bias):
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16, bias)).bfloat16()
    convert(model, rank=3)
    assert {p.dtype for p in model[1].point} == {torch.float32}
    assert not bias or model[1].bias.dtype == torch.bfloat16
    assert model(torch.arange(4)).dtype == torch.bfloat16
    assert {p.dtype for p in to_dense(model).parameters()} == {torch.bfloat16}


def test_shared_module_is_replaced_everywhere_and_counted_once():
    inner = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": inner, "b": nn.Sequential(inner, inner), "c": nn.Linear(16, 16)})
    convert(model, {"b.0": 2})
    assert model["a"] is model["b"][0] is model["b"][1] and isinstance(model["a"], LowRankLinear)
    assert model.lowrank_plan.ranks == {"a": 2}
    assert model.lowrank_plan.parameters == sum(p.numel() for p in model.parameters())
    to_dense(model)
    assert model["a"] is model["b"][1] and type(model["a"]) is nn.Linear


def test_root_that_is_a_layer_is_returned_converted():
    dense = nn.Linear(16, 16)
    model = convert(dense, rank=3)
    assert isinstance(model, LowRankLinear) and model.lowrank_plan.ranks == {"": 3}
    assert type(to_dense(model)) is nn.Linear


def test_second_conversion_changes_nothing():
    model = convert(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)), budget=0.5)
    before, plan = dict(model.named_parameters()), model.lowrank_plan
    for again in (lambda: convert(model, budget=0.5), lambda: convert(model, plan)):
        assert again() is model
        assert all(p is before[name] for name, p in model.named_parameters())
        assert model.lowrank_plan.ranks == plan.ranks
        assert [e.error for e in model.lowrank_plan.entries] == [e.error for e in plan.entries]


def test_plan_from_json_converts_another_copy():
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv2d(8, 8, 3))
    plan = Plan.from_json(json.loads(json.dumps(plan_ranks(model, ratio=0.25).to_json())))
    convert(model, plan)
    assert isinstance(model[0], LowRankLinear) and isinstance(model[1], LowRankConv2d)


def test_works_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 8, 3))
    plan = convert(model, budget=0.5).lowrank_plan
    assert all(p.is_meta for p in model.parameters())
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert {e.error for e in plan.entries} == {None}
    assert all(p.is_meta for p in to_dense(model).parameters())


def unchanged(model, before):
    now = dict(model.named_parameters())
    return now.keys() == before.keys() and all(now[k] is before[k] for k in now)


def test_changes_nothing_if_a_later_layer_fails():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="finite weights, got NaN or infinity in '1'"):
        convert(model, rank=2)
    assert unchanged(model, before) and not hasattr(model, "lowrank_plan")


def forget(model):
    return model[:1]


def shrink(model):
    model[1] = nn.Linear(16, 8)
    return model


def hook(model):
    model[1].register_forward_hook(lambda *_: None)
    return model


def other_rank(model):
    model[1] = convert(model[1], rank=3)
    return model


@pytest.mark.parametrize(
    "change, found",
    [
        (forget, "a model without such a layer"),
        (shrink, "a linear of 8x16"),
        (hook, "a layer that must stay dense: it has hooks"),
        (other_rank, "a layer of rank 3 already"),
    ],
)
def test_refuses_a_plan_of_another_model(change, found):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    plan = plan_ranks(model, rank=2)
    model = change(model)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=f"16x16 at '1' for rank 2, got {found}"):
        convert(model, plan)
    assert unchanged(model, before)


def test_refuses_a_plan_and_wishes():
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(TypeError, match="got a plan and rank"):
        convert(model, plan_ranks(model, rank=2), rank=3)


def test_refuses_a_wrapped_model():
    # A real one needs a process group; only its type matters here.
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Linear(16, 16)
    with pytest.raises(ValueError, match="got DistributedDataParallel; convert first"):
        convert(wrapped, rank=2)


@pytest.mark.parametrize("back", [to_dense, to_factors])
def test_way_back_refuses_to_lose_a_hook(back):
    model = convert(nn.Sequential(nn.Linear(16, 16)), rank=2)
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"{back.__name__} needs layers without hooks"):
        back(model)
    assert isinstance(model[0], LowRankLinear)


@pytest.mark.parametrize("after", [lambda model: model, to_dense, to_factors])
def test_transformer_layer_runs_its_fused_evaluation(after):
    model = convert(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), ratio=0.25).eval()
    x = torch.randn(2, 3, 16)
    wanted = model(x)  # with gradients: the plain path
    with torch.no_grad():
        assert relative(after(model)(x), wanted) < TOL[torch.float32]


def hugging_face(name):
    """A tiny model of a Hugging Face class, with random weights."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    bert = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=8, **common)
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        config = transformers.BertConfig(
            num_hidden_layers=2, max_position_embeddings=8, **bert, **common
        )
        return transformers.BertForMaskedLM(config)
    config = transformers.LlamaConfig(num_hidden_layers=2, **bert, **common)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("name, kind, dense", [
    ("gpt2", "conv1d", {"lm_head": "skipped by the pattern 'lm_head'"}),
    ("bert", "linear", {"cls.predictions.decoder": "its weight is tied to another module's"}),
    ("llama", "linear", {"lm_head": "skipped by the pattern 'lm_head'"}),
])  # fmt: skip
def test_hugging_face_model_is_converted_and_restored(name, kind, dense):
    model = hugging_face(name).eval()
    types = {n: type(m) for n, m in model.named_modules()}
    tokens = torch.randint(40, (2, 6))
    plan = convert(model, ratio=0.25).lowrank_plan
    assert {e.kind for e in plan.entries if e.rank} == {kind}
    assert {e.name: e.reason for e in plan.entries if e.rank is None} == dense
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    wanted = model(tokens).logits
    wanted.sum().backward()
    factors = to_factors(copy.deepcopy(model))
    assert relative(factors(tokens).logits, wanted) < TOL[torch.float32]
    assert relative(to_dense(model)(tokens).logits, wanted) < TOL[torch.float32]
    assert {n: type(m) for n, m in model.named_modules()} == types


# peft 0.21 still asks transformers 5 for the old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_layers_of_a_peft_adapter_stay_dense():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(hugging_face("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    reasons = {c.name: c.reason for c in find_candidates(model)}
    inside = [reason for name, reason in reasons.items() if ".q_proj." in name]
    assert inside and all("PEFT adapter" in reason for reason in inside)
    assert any(reason == "" for name, reason in reasons.items() if ".k_proj" in name)
