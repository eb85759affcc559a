"""To plain LoRA and back: the same logits, the same merged weights, in every family and kind of layer."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import FAMILIES, batch, blur, config, logits, mlp, tiny, wrapped
from safetensors.torch import load_file, save_file
from tiny_models import relative

from lowrank_geo.peft import FixedRankConfig, export_lora, import_lora
from lowrank_geo.peft.layer import FixedRankLayer

TOL = 1e-6  # the promise: merged dense weights and logits of the export, float32


def weights(model):
    return {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p
        for n, p in model.state_dict().items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["random", "pissa"])
def test_an_export_merges_to_the_same_weights_and_logits(family, init, tmp_path):
    model, inputs = wrapped(family, init=init, scale=0.7), batch(family)
    blur(model)
    expected = logits(model, inputs)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert relative(logits(loaded, inputs), expected) < 2e-6
    ours, theirs = weights(model.merge_and_unload()), weights(loaded.merge_and_unload())
    assert ours.keys() == theirs.keys()
    assert all(relative(theirs[key], ours[key]) < TOL for key in ours if ours[key].norm() > 0)


def test_every_kind_of_layer_is_exported_with_its_rank_as_alpha(tmp_path):
    x = torch.randint(0, 11, (7, 6))
    settings = dict(r=3, init="random", rank_pattern={"4": 2}, modules_to_save=["6"])
    model = get_peft_model(mlp(), FixedRankConfig(target_modules=["0", "2", "4"], **settings))
    blur(model)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert relative(loaded(x), model.eval()(x)) < 2e-6
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (3, 3)
    assert written["rank_pattern"] == written["alpha_pattern"] == {"4": 2}


def test_blocks_are_exported_with_the_sum_of_their_ranks(tmp_path):
    inputs = batch("decoder-conv1d")
    settings = dict(
        block_patterns={"c_attn": "(h p d) n -> p (h d) n"}, block_sizes={"p": 3, "h": 2}
    )
    model = wrapped("decoder-conv1d", target_modules=["c_attn"], **settings)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("decoder-conv1d"), tmp_path).eval()
    assert loaded.peft_config["default"].r == 9
    assert relative(logits(loaded, inputs), logits(model, inputs)) < 2e-6


def test_an_export_needs_no_import_of_the_package(tmp_path):
    model = get_peft_model(mlp(), FixedRankConfig(r=2, init="random", target_modules=["6"]))
    export_lora(model, tmp_path)
    code = f"""
import sys
from peft import PeftModel
from torch import nn
model = nn.Sequential(*[nn.Identity() for _ in range(6)], nn.Linear(12, 5))
PeftModel.from_pretrained(model, {str(tmp_path)!r})
assert "lowrank_geo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_peft_converts_the_adapter_to_lora_itself():
    model, inputs = wrapped("decoder", task_type=None), batch("decoder")
    assert model.supports_lora_conversion()
    settings, state = (
        peft.convert_to_lora(model, 3) if hasattr(peft, "convert_to_lora") else (None, None)
    )
    if settings is None:
        pytest.skip("this version of PEFT does not convert")
    lora = get_peft_model(tiny("decoder"), settings)
    peft.set_peft_model_state_dict(lora, state)
    assert relative(logits(lora.eval(), inputs), logits(model, inputs)) < 1e-4


def lora(family="decoder", **changes):
    """A LoRA adapter that changes the model."""
    settings = dict(
        r=3,
        lora_alpha=7,
        target_modules=FAMILIES[family].targets,
        init_lora_weights=False,
        fan_in_fan_out=family == "decoder-conv1d",
    )
    model = get_peft_model(tiny(family), LoraConfig(**settings | changes)).eval()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("r", [None, 3, 5])
def test_a_lora_adapter_is_imported_exactly(family, r, tmp_path, capsys):
    model = lora(family, use_rslora=r == 5, task_type=FAMILIES[family].task)
    blur(model)
    model.save_pretrained(tmp_path)
    imported = import_lora(tiny(family), tmp_path, r=r).eval()
    assert relative(logits(imported, batch(family)), logits(model, batch(family))) < 5e-6
    assert capsys.readouterr().out == ""
    for layer in imported.modules():
        if isinstance(layer, FixedRankLayer):
            (triple,) = layer.triples("default")
            assert (triple.V.mT @ triple.V - torch.eye(triple.rank)).abs().max() < 1e-5


def test_patterns_of_alpha_and_rank_are_read(tmp_path):
    patterns = dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9})
    model = lora(**patterns)
    model.save_pretrained(tmp_path)
    imported = import_lora(tiny("decoder"), tmp_path).eval()
    assert relative(logits(imported, batch("decoder")), logits(model, batch("decoder"))) < 5e-6


def test_a_smaller_rank_keeps_the_nearest_matrix_and_says_the_error(tmp_path, capsys):
    model = lora()
    model.save_pretrained(tmp_path)
    imported = import_lora(tiny("decoder"), tmp_path, r=2)
    lost = []
    pairs = zip(
        [m for m in imported.modules() if isinstance(m, FixedRankLayer)],
        [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")],
        strict=True,
    )
    for mine, theirs in pairs:
        exact, found = theirs.get_delta_weight("default"), mine.get_delta_weight("default")
        best = torch.linalg.svdvals(exact)[2:].norm()
        assert abs((exact - found).norm() - best) < 1e-5 * exact.norm()
        lost.append((best / exact.norm()).item())
    assert f"largest relative error of ΔW {max(lost):.3g}" in capsys.readouterr().out


def test_there_and_back_is_the_same_adapter(tmp_path):
    model, inputs = wrapped("encoder"), batch("encoder")
    export_lora(model, tmp_path)
    assert (
        relative(
            logits(import_lora(tiny("encoder"), tmp_path).eval(), inputs), logits(model, inputs)
        )
        < 5e-6
    )


@pytest.mark.parametrize(
    "changes, names",
    [
        (dict(use_dora=True), "use_dora"),
        (dict(bias="all"), "bias"),
        (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    ],
)
def test_variants_of_lora_are_refused(changes, names, tmp_path):
    lora(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"uses {names}, which is not a change B A of the weights"):
        import_lora(tiny("decoder"), tmp_path)


def test_files_that_are_no_lora_adapter_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Can't find 'adapter_model.safetensors' at"):
        import_lora(tiny("decoder"), tmp_path)
    wrapped("decoder").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type LOWRANK_GEO. Please pass a LORA adapter"):
        import_lora(tiny("decoder"), tmp_path)
    lora().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(ValueError, match="no complete pairs of lora_A and lora_B"):
        import_lora(tiny("decoder"), tmp_path)
    save_file(tensors | {key: torch.zeros(2, 32)}, file)
    with pytest.raises(ValueError, match="which do not fit together"):
        import_lora(tiny("decoder"), tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="are damaged"):
        import_lora(tiny("decoder"), tmp_path)


def test_what_lora_cannot_hold_is_refused(tmp_path):
    model = get_peft_model(mlp(), FixedRankConfig(r=2, target_modules=["4"], bias="all"))
    with pytest.raises(
        ValueError, match="Cannot export an adapter with `bias='all'` as plain LoRA"
    ):
        export_lora(model, tmp_path)
    with pytest.raises(ValueError, match="Adapter other does not exist"):
        export_lora(model, tmp_path, adapter_name="other")
    with pytest.raises(ValueError, match="export_lora needs a PeftModel, got Sequential"):
        export_lora(mlp(), tmp_path)
    both = get_peft_model(mlp(), FixedRankConfig(r=2, target_modules=["4"]))
    both.add_adapter("other", FixedRankConfig(r=2, target_modules=["6"]))
    both.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"the active adapters \['default', 'other'\] as one"):
        export_lora(both, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family, changes, sentence",
    [
        ("encoder", {}, "not found in the base model"),
        ("decoder", dict(num_hidden_layers=1), "not found in the base model"),
        ("decoder", dict(hidden_size=64), "are for a weight of .*, which .* it has 64x64 there"),
        ("decoder", dict(vocab_size=50), r"'lm_head.weight' has \(50, 32\)"),
    ],
)
def test_an_adapter_of_another_model_is_refused_and_changes_nothing(
    family, changes, sentence, tmp_path
):
    lora(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    base = tiny(family, **changes)
    modules = list(base.modules())
    with pytest.raises(ValueError, match=sentence):
        import_lora(base, tmp_path)
    assert list(base.modules()) == modules and not hasattr(base, "peft_config")
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "is no JSON"),
        ("[]", "holds no settings by name"),
        ('{"peft_type": "LORA"}', "`lora_alpha` of '.*' should be a number .* says None"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(text, sentence, tmp_path):
    lora().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        import_lora(tiny("decoder"), tmp_path)


def test_a_rank_of_zero_is_not_that_of_the_file(tmp_path):
    lora().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`r` should be a positive integer value .* passed is 0"):
        import_lora(tiny("decoder"), tmp_path, r=0)


def test_configurations_are_equal_after_a_round_trip(tmp_path):
    made = config("decoder", rank_pattern={"q_proj": 2})
    made.save_pretrained(str(tmp_path))
    assert FixedRankConfig.from_pretrained(str(tmp_path)).to_dict() == made.to_dict()
