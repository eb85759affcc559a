"""Saved adapters and the models that they are loaded on: what does not fit is refused before a layer is wrapped."""

import json
import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import FAMILIES, batch, config, logits, tiny, wrapped
from test_peft_blocks import Mixture, mixture
from torch import nn

from lowrank_geo.peft import FixedRankConfig
from lowrank_geo.peft.layer import FixedRankLayer

PROJECTIONS = dict(block_patterns={"c_attn": "(p d) n -> p d n"}, block_sizes={"p": 3})
# What makes the model of a family wider.
WIDTH = {
    "decoder-conv1d": dict(n_embd=64),
    "encoder-decoder": dict(d_model=64),
}


def refused(base, folder, sentence):
    """Loading raises ValueError, and the model is what it was."""
    modules, state = list(base.modules()), list(base.state_dict())
    with pytest.raises(ValueError, match=sentence):
        PeftModel.from_pretrained(base, folder)
    assert list(base.modules()) == modules and list(base.state_dict()) == state
    assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("init", ["random", "pissa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_a_narrower_model_is_refused(family, init, safe, tmp_path):
    wrapped(family, init=init).save_pretrained(tmp_path, safe_serialization=safe)
    wide = tiny(family, **WIDTH.get(family, dict(hidden_size=64)))
    refused(
        wide, tmp_path, r"The adapter weights of '.*' are for a weight of .*, which does not fit"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_a_deeper_model_is_refused(family, tmp_path):
    wrapped(family).save_pretrained(tmp_path)
    deep = {"decoder-conv1d": "n_layer", "encoder-decoder": "num_layers"}
    shallow = tiny(family, **{deep.get(family, "num_hidden_layers"): 1})
    refused(shallow, tmp_path, "Target modules .* not found in the base model. Please load")


def test_a_deeper_model_has_no_change_where_the_adapter_has_none(tmp_path):
    wrapped("decoder", init="zero").save_pretrained(tmp_path)
    base = tiny("decoder", num_hidden_layers=3)
    expected = logits(base, batch("decoder"))
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(loaded, batch("decoder")), expected)


def test_a_head_for_other_labels_is_refused(tmp_path):
    wrapped("encoder").save_pretrained(tmp_path)
    base = tiny("encoder", num_labels=5)
    refused(base, tmp_path, r"'.*classifier.*' has shape .*2.*, which does not fit .*5")


def test_blocks_of_another_model_are_refused(tmp_path):
    settings = dict(r=2, init="random", target_modules=["c_attn"])
    made = FixedRankConfig(**settings, **PROJECTIONS)
    get_peft_model(tiny("decoder-conv1d"), made).save_pretrained(tmp_path)
    refused(
        tiny("decoder-conv1d", n_embd=64), tmp_path, "are for a weight of 3 of 32x32, .* 3 of 64x64"
    )


@pytest.mark.parametrize("is_transposed", [False, True])
def test_parameters_of_other_experts_are_refused(is_transposed, tmp_path):
    mixture(is_transposed).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(Mixture(is_transposed), tmp_path)
    other = Mixture(is_transposed)
    other.experts.down = nn.Parameter(torch.randn(4, *other.experts.down.shape[1:]))
    refused(
        other, tmp_path, "are for a weight of 3 of 4x6, .* has 3 of 6x4 or 4 of 4x6 or 5x4 there"
    )


def test_a_second_adapter_that_does_not_fit_leaves_the_first(tmp_path):
    get_peft_model(tiny("decoder", hidden_size=64), config("decoder")).save_pretrained(tmp_path)
    model, inputs = wrapped("decoder"), batch("decoder")
    before, keys = logits(model, inputs), list(model.state_dict())
    with pytest.raises(ValueError, match="which does not fit the base model"):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model, inputs), before) and list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == keys


def test_ranks_of_a_pickle_are_checked_too(tmp_path):
    wrapped("decoder").save_pretrained(tmp_path, safe_serialization=False)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": 4}))
    refused(tiny("decoder"), tmp_path, r"has shape .*3\), but the configuration says `r` = 4")


class Attack:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (os.mkdir, (self.file,))


@pytest.mark.parametrize("content", ["code", "junk", "list"])
def test_a_pickle_of_anything_but_tensors_is_refused_and_not_run(content, tmp_path):
    wrapped("decoder").save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "adapter_model.bin"
    if content == "junk":
        file.write_bytes(file.read_bytes()[:300])
    else:
        torch.save({"weight": Attack(tmp_path / "run")} if content == "code" else [1], file)
    refused(tiny("decoder"), tmp_path, "The adapter weights in '.*' are damaged")
    assert not (tmp_path / "run").exists()


# PEFT looks for the pattern among modules alone, and finds it among parameters all the same.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
def test_ranks_of_parameters_may_differ(tmp_path):
    model, x = mixture(rank_pattern={"experts.up": 1}), torch.randn(2, 4)
    ranks = {
        m.parameter_name: m.fixed_rank_r for m in model.modules() if isinstance(m, FixedRankLayer)
    }
    assert ranks == {"up": {"default": 1}, "down": {"default": 2}, "mix": {"default": 2}}
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Mixture(), tmp_path).eval()(x), model(x))
