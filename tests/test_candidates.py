"""candidates: every layer that stays dense has its reason, and PEFT, attention and hooks are safe."""

import pytest
import torch
from tiny_models import hugging_face, mlp, numel
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank_geo.candidates import find_candidates
from lowrank_geo.convert import convert
from lowrank_geo.plan import plan_ranks


class Sub(nn.Linear):
    pass


def hooked():
    layer = nn.Linear(32, 32)
    layer.register_forward_hook(lambda *_: None)
    return layer


def int8():
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    return layer


def pruned():
    return prune.l1_unstructured(nn.Linear(32, 32), "weight", amount=0.5)


def with_replaced_forward():
    layer = nn.Linear(32, 32)
    layer.forward = lambda x: x
    return layer


def with_an_adapter():
    layer = nn.Linear(32, 32)
    layer.register_parameter("adapter", nn.Parameter(torch.zeros(2)))
    return layer


DENSE = {
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
        "parametrized: weight",
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(32, 32)), "parametrized: weight"),
    "pruned": (pruned, "computed from other parameters"),
    "subclass": (lambda: Sub(32, 32), "a Sub, only Linear"),
    "int8": (int8, "int8, quantised"),
    "grouped": (lambda: nn.Conv2d(32, 32, 3, groups=4), "of 4 groups"),
    "transposed": (lambda: nn.ConvTranspose2d(32, 32, 3), "a ConvTranspose2d"),
    "conv1d": (lambda: nn.Conv1d(32, 32, 3), "a Conv1d, only"),
    "hooked": (hooked, "hooks"),
    "replaced forward": (with_replaced_forward, "hooks or a replaced forward"),
    "adapter": (with_an_adapter, "also holds adapter"),
    "too small": (lambda: nn.Linear(3, 1), "no rank from 1 up saves"),
    "empty": (lambda: nn.Conv2d(1, 1, 1), "no rank from 1 up saves"),
}


@pytest.mark.parametrize("name", DENSE)
def test_stays_dense_with_its_reason(name):
    build, reason = DENSE[name]
    model = nn.Sequential(build(), nn.Linear(64, 64))
    plan = plan_ranks(model, ratio=0.1)
    assert reason in plan.entries[0].reason
    assert plan.ranks == {"1": 6}
    assert numel(convert(model, plan)) == plan.parameters


def test_attention_stays_dense_but_the_mlp_of_its_block_does_not():
    plan = plan_ranks(nn.TransformerEncoderLayer(32, 2, 64), ratio=0.25)
    reasons = {e.name: e.reason for e in plan.entries}
    assert "MultiheadAttention" in reasons["self_attn"]
    assert "MultiheadAttention" in reasons["self_attn.out_proj"]
    assert plan.ranks == {"linear1": 8, "linear2": 8}


def test_a_plain_linear_put_into_attention_stays_dense():
    attention = nn.MultiheadAttention(32, 2)
    attention.out_proj = nn.Linear(32, 32)
    assert plan_ranks(attention, ratio=0.25).ranks == {}


def test_skip_means_everything_inside_and_names_its_pattern():
    model = nn.ModuleDict({"a": mlp(32, 32, 32), "b": mlp(32, 32)})
    plan = plan_ranks(model, ratio=0.25, skip="a")
    assert list(plan.ranks) == ["b.0"]
    assert plan.entries[0].reason == "skipped by the pattern 'a'"


@pytest.mark.parametrize("head", ["lm_head", "head", "score", "fc"])
def test_output_heads_are_skipped_by_default(head):
    model = nn.ModuleDict({head: nn.Linear(32, 32), "wide": nn.Linear(32, 32)})
    assert list(plan_ranks(model, rank=2).ranks) == ["wide"]
    assert list(plan_ranks(model, rank=2, skip=()).ranks) == [head, "wide"]


# peft 0.21 still asks transformers 5 for the old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_layers_of_a_peft_adapter_stay_dense():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(hugging_face("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    reasons = {c.name: c.reason for c in find_candidates(model)}
    inside = [reason for name, reason in reasons.items() if ".q_proj." in name]
    assert inside and all("PEFT adapter" in reason for reason in inside)
    assert any(reason == "" for name, reason in reasons.items() if ".k_proj" in name)
