"""Fixed-rank adapters in encoders, decoders, encoder-decoders and vision models: PEFT's own cases, by our oracles."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import (
    FAMILIES,
    GENERATING,
    batch,
    blur,
    config,
    descent,
    logits,
    needs_peft,
    tiny,
    wrapped,
)
from tiny_models import relative

import lowrank_geo
from lowrank_geo.peft import FixedRankConfig
from lowrank_geo.peft.layer import FixedRankLayer

every_family = pytest.mark.parametrize("family", FAMILIES)
every_writer = pytest.mark.parametrize("family", GENERATING)
TOL = 2e-6  # ten times the worst relative error of merged logits over the families


@every_family
def test_a_zero_core_leaves_the_logits_bit_for_bit(family):
    expected = logits(tiny(family), batch(family))
    assert torch.equal(logits(wrapped(family, init="zero"), batch(family)), expected)
    assert not torch.equal(logits(wrapped(family), batch(family)), expected)


@every_family
@pytest.mark.parametrize("autocast", [False, True])
def test_a_zero_core_leaves_half_precision_bit_for_bit(family, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = batch(family)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = logits(tiny(family).to(dtype), inputs)
        model = get_peft_model(tiny(family).to(dtype), config(family, init="zero")).eval()
        assert torch.equal(logits(model, inputs), expected)


@every_family
def test_every_layer_has_the_parameters_of_lora_and_r_squared_more(family):
    targets, r = FAMILIES[family].targets, 3
    counts = []
    turned = family == "decoder-conv1d"
    for made in (
        FixedRankConfig(r=r, target_modules=targets),
        LoraConfig(r=r, target_modules=targets, fan_in_fan_out=turned),
    ):
        model = get_peft_model(tiny(family), made)
        counts.append(
            {
                name: sum(p.numel() for p in module.parameters() if p.requires_grad)
                for name, module in model.named_modules()
                if isinstance(module, BaseTunerLayer)
            }
        )
    ours, lora = counts
    assert ours.keys() == lora.keys() and ours
    assert all(ours[name] == lora[name] + r**2 for name in ours)


@every_family
def test_only_the_adapter_is_trained_and_the_head_if_it_is_to_be_saved(family):
    model = wrapped(family)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".fixed_rank_delta." in n} | {
        n for n, _ in model.named_parameters() if ".modules_to_save." in n
    }
    assert model.get_model_status().peft_types == {"default": "LOWRANK_GEO"}
    layers = model.get_layer_status()
    assert all(status.requires_grad == {"default": True} for status in layers)


@every_family
@pytest.mark.parametrize("low_cpu_mem", [False, True])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_a_saved_adapter_loads_into_the_same_model(family, low_cpu_mem, safe, tmp_path):
    model = wrapped(family)
    blur(model)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path, low_cpu_mem_usage=low_cpu_mem)
    assert torch.equal(logits(loaded.eval(), batch(family)), logits(model, batch(family)))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.peft_config["default"].r == 3


@every_family
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_unmerging_keep_the_logits(family, safe_merge):
    model, inputs = wrapped(family), batch(family)
    blur(model)
    expected, base = logits(model, inputs), logits(tiny(family), inputs)
    model.merge_adapter(safe_merge=safe_merge)
    assert relative(logits(model, inputs), expected) < TOL
    model.unmerge_adapter()
    assert relative(logits(model, inputs), expected) < TOL
    with model.disable_adapter():
        assert relative(logits(model, inputs), base) < TOL
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert relative(logits(merged, inputs), expected) < TOL
    assert not [m for m in merged.modules() if isinstance(m, FixedRankLayer)]
    assert type(merged) is FAMILIES[family].model


@every_family
def test_disabled_and_unloaded_it_is_the_base_model_bit_for_bit(family):
    inputs = batch(family)
    expected = logits(tiny(family), inputs)
    model = get_peft_model(tiny(family), config(family, task_type=None)).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, inputs), expected)
    assert unloaded.state_dict().keys() == tiny(family).state_dict().keys()


@every_family
def test_training_lowers_the_loss_and_moves_nothing_but_the_adapter(family):
    model, inputs = wrapped(family, init="zero").train(), batch(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = lowrank_geo.param_groups(model, lr=0.02, euclidean_lr=0.01)
    optimizer = lowrank_geo.optim.RiemannianAdam(groups)
    losses = descent(model, optimizer, inputs, 8)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(family):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = wrapped(family).train()
        lowrank_geo.param_groups(model)
        if checkpointing:
            # transformers 5.24 renamed it.
            new = hasattr(model, "activation_checkpointing_enable")
            name = "activation_checkpointing_enable" if new else "gradient_checkpointing_enable"
            getattr(model, name)({"use_reentrant": checkpointing == "reentrant"})
            if family != "vision":
                model.enable_input_require_grads()
        model(**batch(family)).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients(None)
    for kind in ("new", "reentrant"):
        if family == "vision" and kind == "reentrant":
            continue  # pixels cannot be asked for gradients; PEFT's adapters have the same limit
        for a, b in zip(plain, gradients(kind), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_runs_and_keeps_the_factors_in_float32(family, dtype, autocast):
    base = tiny(family) if autocast else tiny(family).to(dtype)
    model = get_peft_model(base, config(family)).eval()
    inputs = batch(family)
    if not autocast and "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = model(**inputs).loss
    loss.backward()
    factors = [p for n, p in model.named_parameters() if ".fixed_rank_delta." in n]
    assert torch.isfinite(loss) and all(p.dtype == torch.float32 for p in factors)
    assert all(torch.isfinite(p.grad).all() for p in factors)
    reference = get_peft_model(tiny(family), config(family)).eval()
    reference.load_state_dict(model.state_dict())
    exact = reference(**batch(family)).loss
    assert abs(exact - loss.float()) < 0.03 * exact  # eight roundings of bfloat16


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merging_rounds_once_in_half_precision(family, dtype):
    model = get_peft_model(tiny(family).to(dtype), config(family)).eval()
    layer = next(m for m in model.modules() if isinstance(m, FixedRankLayer))
    weight = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter()
    wanted = (weight.float() + layer.get_delta_weight("default")).to(dtype)
    assert torch.equal(layer.get_base_layer().weight, wanted)


@every_family
def test_several_adapters_switch_and_go(family):
    model, inputs = wrapped(family), batch(family)
    first = logits(model, inputs)
    model.add_adapter("other", config(family, r=2))
    assert torch.equal(logits(model, inputs), first)
    model.set_adapter("other")
    other = logits(model.eval(), inputs)
    assert not torch.equal(other, first)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".other." in name for name in trained)
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model, inputs), first)
    assert not [name for name, _ in model.named_parameters() if ".other." in name]


@every_family
def test_a_mixed_batch_is_what_each_adapter_gives_alone(family):
    model, inputs = get_peft_model(tiny(family), config(family, task_type=None)), batch(family)
    model.add_adapter("other", config(family, task_type=None, r=2))
    model.eval()
    alone = {"__base__": logits(tiny(family), inputs)}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, inputs)
    names = ["other", "__base__", "default"]
    mixed = logits(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        assert relative(mixed[row], alone[name][row]) < TOL


@every_writer
def test_generation_uses_the_adapter(family):
    model, inputs = wrapped(family), batch(family)
    blur(model)
    inputs.pop("labels")
    options = dict(max_new_tokens=4, do_sample=False)
    written = model.generate(**inputs, **options)
    assert torch.equal(written, model.merge_and_unload().generate(**inputs, **options))


@every_writer
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_mixed_adapters_is_that_of_each_alone(family, beams):
    model = get_peft_model(tiny(family), config(family, task_type=None))
    model.add_adapter("other", config(family, task_type=None, r=2))
    model.eval()
    inputs = batch(family)
    inputs.pop("labels")
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=beams)
    names = ["other", "__base__", "default"]
    mixed = model.generate(**inputs, adapter_names=names, **options)
    for row, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            if name != "__base__":
                model.set_adapter(name)
            alone = model.generate(**inputs, **options)
        assert torch.equal(mixed[row], alone[row])


@needs_peft(0, 20, "loads a state without its wrapper")
@every_family
def test_injection_without_a_wrapper_gives_the_same_model(family):
    model, inputs = wrapped(family, task_type=None), batch(family)
    bare = tiny(family)
    peft.inject_adapter_in_model(config(family, task_type=None), bare)
    state = peft.get_peft_model_state_dict(model)
    result = peft.set_peft_model_state_dict(bare, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(bare.eval(), inputs), logits(model, inputs))


@needs_peft(0, 20, "loads a state without its wrapper")
@every_family
def test_transformers_add_save_and_load_an_adapter(family, tmp_path, monkeypatch):
    # transformers 5.24 asks for a PEFT that is not released yet.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    model, inputs = tiny(family), batch(family)
    model.add_adapter(config(family, task_type=None), adapter_name="mine")
    expected = logits(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    loaded = tiny(family)
    loaded.load_adapter(str(tmp_path), adapter_name="again")
    assert torch.equal(logits(loaded.eval(), inputs), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded, inputs), logits(tiny(family), inputs))


@every_writer
def test_embeddings_instead_of_indices(family):
    model, inputs = wrapped(family), batch(family)
    ids = inputs.pop("input_ids")
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(
        logits(model, inputs | {"inputs_embeds": embedded}),
        logits(model, inputs | {"input_ids": ids}),
    )


@every_family
def test_layer_indices_choose_the_layers(family):
    if family == "encoder-decoder":
        pattern = "block"
    else:
        pattern = {"encoder": "layer", "decoder": "layers", "vision": "layers"}.get(family, "h")
    model = wrapped(family, layers_to_transform=[0], layers_pattern=pattern)
    adapted = [n for n, m in model.named_modules() if isinstance(m, FixedRankLayer)]
    assert adapted and all(f".{pattern}.0." in name for name in adapted)


@every_family
def test_a_copy_computes_the_same(family):
    model = wrapped(family)
    assert torch.equal(logits(copy.deepcopy(model), batch(family)), logits(model, batch(family)))


def test_defaults_choose_targets_for_known_architectures():
    model = get_peft_model(tiny("decoder"), FixedRankConfig(r=2, task_type="CAUSAL_LM"))
    adapted = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, FixedRankLayer)}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_leaves_out_the_head(family):
    model = wrapped(family, target_modules="all-linear")
    adapted = {n for n, m in model.named_modules() if isinstance(m, FixedRankLayer)}
    assert adapted
    if FAMILIES[family].task:  # PEFT knows a classifier by the task alone
        assert not [name for name in adapted if name.endswith(("lm_head", "classifier"))]
    model.add_adapter("second", config(family, target_modules="all-linear"))
    again = {
        n
        for n, m in model.named_modules()
        if isinstance(m, FixedRankLayer) and len(m.fixed_rank_r) == 2
    }
    assert again == adapted
