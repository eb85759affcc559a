"""architecture: models built again from their config, and no foreign class, size or code."""

import hashlib
import json

import pytest
import torch
from tiny_models import forge, hugging_face, same
from torch import nn

from lowrank_geo.architecture import skeleton
from lowrank_geo.convert import convert, to_dense
from lowrank_geo.models.decoder import Decoder, DecoderConfig
from lowrank_geo.saving import load_pretrained, save_pretrained

SIZES = DecoderConfig(vocab_size=40, width=32, layers=2, heads=2, hidden=64, context=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_hugging_face_model_is_rebuilt_with_the_same_logits(tmp_path, name, dtype):
    model = convert(hugging_face(name).to(dtype).eval(), ratio=0.25)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    tokens = torch.randint(40, (2, 6))
    assert type(loaded) is type(model) and same(model, loaded) and not loaded.training
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.lowrank_plan == model.lowrank_plan
    changed = {"architectures": [type(model).__name__], "_name_or_path": str(tmp_path)}
    assert loaded.config.to_dict() == {**model.config.to_dict(), **changed}


def test_generation_config_is_kept(tmp_path):
    model = convert(hugging_face("gpt2"), ratio=0.25)
    model.generation_config.eos_token_id = [0, 7]
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path).generation_config.eos_token_id == [0, 7]


def test_saving_again_leaves_no_config_of_the_older_model(tmp_path):
    save_pretrained(convert(hugging_face("gpt2"), ratio=0.25), tmp_path)
    assert {"config.json", "generation_config.json"} <= {p.name for p in tmp_path.iterdir()}
    save_pretrained(convert(nn.Sequential(nn.Linear(8, 8)), rank=2), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"lowrank_plan.json", "model.safetensors"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_decoder_is_rebuilt_with_the_same_logits(tmp_path, tied, dtype):
    config = DecoderConfig(**{**SIZES.__dict__, "tie_embeddings": tied})
    model = convert(Decoder(config).to(dtype), ratio=0.25)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    tokens = torch.randint(40, (2, 6))
    assert torch.equal(loaded(tokens), model(tokens)) and same(model, loaded)
    assert (loaded.lm_head.weight is loaded.embed.weight) == tied
    assert loaded.config == config


def test_skeleton_has_real_buffers_draws_no_random_numbers_and_leaves_no_hook():
    def build():
        model = nn.Sequential(nn.Linear(4, 4))
        model.register_buffer("noise", torch.randn(3))
        return model

    before = torch.get_rng_state()
    model = skeleton(build)
    assert torch.equal(torch.get_rng_state(), before)
    assert model[0].weight.is_meta and not model.noise.is_meta and not model.training
    assert not nn.Linear(2, 2).weight.is_meta


HOSTILE = {
    "library": ({"library": "os", "class": "system", "config": "x"}, "got 'os' 'system'"),
    "class": ({"class": "AutoTokenizer"}, "got 'AutoTokenizer'"),
    "private": ({"class": "__dict__"}, "got '__dict__'"),
    "missing": ({"class": "NoSuchModel"}, "a model class of transformers .*, got 'NoSuchModel'"),
    "config": ({"config": "0" * 64}, "needs the config.json that belongs to the weights"),
    "other class": (
        {"class": "BertForMaskedLM"},
        "makes a BertForMaskedLM, .* a LlamaConfig",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_a_class_or_config_that_is_not_of_the_model(tmp_path, name):
    save_pretrained(convert(hugging_face("llama"), ratio=0.25), tmp_path)
    changes, message = HOSTILE[name]
    forge(tmp_path, lambda content: content["architecture"].update(changes))
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**9}, {"hidden_size": "wide"}, {"num_attention_heads": 0}]
)
def test_refuses_a_forged_transformers_config(tmp_path, changes):
    save_pretrained(convert(hugging_face("llama"), ratio=0.25), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    forge_config(tmp_path, {**config, **changes})
    with pytest.raises(ValueError, match="needs a config that makes a LlamaForCausalLM") as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def forge_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    forge(folder, lambda content: content["architecture"].update(config=digest))


def test_config_with_foreign_code_runs_none_of_it(tmp_path):
    save_pretrained(convert(hugging_face("llama"), ratio=0.25), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    forge_config(tmp_path, config)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="needs a config that makes a LlamaForCausalLM"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 33}, "needs a config that makes a Decoder"),
        ({"color": 3}, "needs a config that makes a Decoder"),
        ({"hidden": 65}, "blocks.0.mlp.gate' .* got a linear of 65x32"),
        ({"vocab_size": 10**12}, "needs a config that makes a Decoder|'embed.weight' of shape"),
        ({"layers": 10**12}, "wants 1000000000000 layers of a file of"),
    ],
)
def test_refuses_a_decoder_of_other_sizes(tmp_path, changes, message):
    save_pretrained(convert(Decoder(SIZES), ratio=0.25), tmp_path)
    forge(tmp_path, lambda content: content["architecture"]["config"].update(changes))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_a_model_without_low_rank_layers_is_saved_too(tmp_path):
    model = to_dense(convert(Decoder(SIZES), ratio=0.25))
    save_pretrained(model, tmp_path)
    assert same(load_pretrained(tmp_path), model)
