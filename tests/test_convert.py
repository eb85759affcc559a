"""convert: everything about a layer but its weight is kept, all or nothing."""

import copy
import json

import pytest
import torch
from tiny_models import hugging_face, relative
from torch import nn

from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.convert import convert, to_dense, to_factors
from lowrank_geo.layers import LowRankLinear, lowrank_layers
from lowrank_geo.plan import Plan, plan_ranks

TOL = {
    torch.float64: 5e-14,
    torch.float32: 3e-6,
}  # 10 x the worst of 20 draws of all cases, relative


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
