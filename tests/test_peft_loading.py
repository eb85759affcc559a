"""Adapters that are saved, loaded and named in every way that PEFT allows, in every family of models."""

import copy

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft_models import FAMILIES, batch, blur, config, logits, needs_peft, tiny, wrapped
from transformers import BertConfig, BertModel

from lowrank_geo.peft import FixedRankConfig
from lowrank_geo.peft.layer import FixedRankLayer

every_family = pytest.mark.parametrize("family", FAMILIES)


def two(family, **changes):
    """A model with the adapters "default" and "other", and the logits with each."""
    model, inputs, found = wrapped(family, **changes), batch(family), {}
    model.add_adapter("other", config(family, **changes | {"r": 2}))
    for name in ("default", "other"):
        model.set_adapter(name)
        found[name] = logits(model.eval(), inputs)
    return model, found


@needs_peft(0, 20, "saves the adapter of the exact name alone")
@every_family
def test_several_saved_adapters_load_beside_each_other(family, tmp_path):
    model, wanted = two(family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="second")
    assert set(loaded.peft_config) == {"default", "second"}
    for name, saved in (("second", "other"), ("default", "default")):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval(), batch(family)), wanted[saved])


@needs_peft(0, 20, "saves the adapter of the exact name alone")
@every_family
def test_one_of_two_adapters_is_saved_where_a_name_is_part_of_the_other(family, tmp_path):
    model = get_peft_model(tiny(family), config(family), adapter_name="mine")
    model.add_adapter("mine_too", config(family, r=2))
    model.set_adapter("mine_too")
    expected = logits(model.eval(), batch(family))
    model.save_pretrained(tmp_path, selected_adapters=["mine_too"])
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["mine_too"]
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path / "mine_too").eval()
    assert torch.equal(logits(loaded, batch(family)), expected)


@every_family
def test_a_configuration_may_be_given_instead_of_the_saved_one(family, tmp_path):
    model = wrapped(family)
    model.save_pretrained(tmp_path)
    settings = FixedRankConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path, config=settings).eval()
    assert loaded.peft_config["default"] is settings and settings.r == 3
    assert torch.equal(logits(loaded, batch(family)), logits(model, batch(family)))


@every_family
def test_loading_changes_no_parameter_of_the_base(family, tmp_path):
    model = wrapped(family, task_type=None)
    blur(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path, torch_device="cpu")
    base, found = tiny(family).state_dict(), loaded.unload().state_dict()
    assert base.keys() == found.keys() and all(torch.equal(base[k], found[k]) for k in base)


@every_family
def test_a_device_map_places_the_adapter(family, tmp_path):
    model = wrapped(family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path, device_map={"": "cpu"}).eval()
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded, batch(family)), logits(model, batch(family)))


@every_family
def test_the_model_says_what_it_is(family):
    model = get_peft_model(tiny(family), config(family), adapter_name="mine")
    assert "FixedRankLinear" in repr(model) and "(mine)" in repr(model)
    assert model.active_adapter == "mine" and list(model.peft_config) == ["mine"]
    assert model.config is model.get_base_model().config  # of the base, found through the wrapper
    layers = [m for m in model.modules() if isinstance(m, FixedRankLayer)]
    for layer in layers:
        triple = layer.triples("mine")[0]
        assert (layer.out_features, layer.in_features) == (len(triple.U), len(triple.V))


@every_family
def test_training_with_quantised_bases_prepared_gives_gradients_to_the_adapter_alone(family):
    base = prepare_model_for_kbit_training(tiny(family), use_gradient_checkpointing=False)
    model = get_peft_model(base, config(family)).train()
    model(**batch(family)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@every_family
def test_two_adapters_on_the_same_and_on_different_layers_train_when_active(family):
    first, *others = FAMILIES[family].targets
    model = get_peft_model(tiny(family), config(family, task_type=None, target_modules=[first]))
    model.add_adapter("other", config(family, task_type=None, target_modules=[first, *others]))

    def trained():
        return {n for n, p in model.named_parameters() if p.requires_grad}

    assert trained() == {n for n, _ in model.named_parameters() if ".default." in n}
    model.set_adapter("other")
    assert trained() == {n for n, _ in model.named_parameters() if ".other." in n}
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()


@every_family
@pytest.mark.parametrize("autocast", [True, False])
def test_factors_stay_in_float32_whatever_peft_is_told(family, autocast, tmp_path):
    base = tiny(family).to(torch.bfloat16)
    model = get_peft_model(base, config(family), autocast_adapter_dtype=autocast)
    factors = [p for n, p in model.named_parameters() if ".fixed_rank_delta." in n]
    assert factors and {p.dtype for p in factors} == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny(family).to(torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast
    )
    again = [p for n, p in loaded.named_parameters() if ".fixed_rank_delta." in n]
    assert all(torch.equal(a, b) for a, b in zip(again, factors, strict=True))


@pytest.mark.parametrize("family", ["decoder", "decoder-conv1d", "encoder-decoder"])
def test_generation_in_half_precision_and_with_positional_inputs(family):
    model = get_peft_model(tiny(family).to(torch.bfloat16), config(family)).eval()
    ids = batch(family)["input_ids"]
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    written = model.generate(input_ids=ids, **options)
    assert written.shape[0] == len(ids) and 0 <= written.min() and written.max() < 40
    if family != "encoder-decoder":  # whose wrapper in PEFT takes names alone
        assert torch.equal(model.generate(ids, **options), written)


def test_an_encoder_without_a_head_gives_its_features(tmp_path):
    def base():
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
        return BertModel(BertConfig(vocab_size=40, num_hidden_layers=2, **sizes)).eval()

    settings = config("encoder", task_type="FEATURE_EXTRACTION", target_modules=["query"])
    model, ids = get_peft_model(base(), settings).eval(), batch("encoder")["input_ids"]
    features = model(input_ids=ids).last_hidden_state
    assert features.shape == (3, 6, 32)
    assert not torch.equal(features, base()(input_ids=ids).last_hidden_state)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).last_hidden_state, features)


def test_wrapping_a_wrapped_model_is_warned_of():
    model = tiny("encoder")
    get_peft_model(model, config("encoder"))
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time"),
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
    ):
        get_peft_model(model, config("encoder"))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@every_family
def test_the_functional_interface_switches_and_deletes(family):
    functional = pytest.importorskip("peft.functional")
    bare, inputs = tiny(family), batch(family)
    for name, r in (("one", 3), ("two", 2)):
        peft.inject_adapter_in_model(config(family, task_type=None, r=r), bare, adapter_name=name)
    found = {}
    for name in ("two", "one"):
        functional.set_adapter(bare, name)
        found[name] = logits(bare.eval(), inputs)
    assert not torch.equal(found["one"], found["two"])
    kept = copy.deepcopy(bare)
    functional.delete_adapter(bare, "two", prefix="fixed_rank_")
    assert torch.equal(logits(bare, inputs), found["one"])
    assert not [n for n, _ in bare.named_parameters() if ".two." in n]
    assert [n for n, _ in kept.named_parameters() if ".two." in n]
