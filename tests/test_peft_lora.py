"""peft.lora: the exported adapter is read by PEFT alone, and the imported one is what it was."""

import json
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import FAMILIES, batch, blur, logits, mlp, tiny, wrapped
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_geo.peft import FixedRankConfig, export_lora, import_lora

every_family = pytest.mark.parametrize("family", FAMILIES)


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


@every_family
@pytest.mark.parametrize("init", ["random", "pissa"])
def test_export_is_a_plain_lora_of_the_same_logits(family, init, tmp_path):
    model, inputs = wrapped(family, init=init, scale=1.7), batch(family)
    blur(model)
    export_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    assert relative(logits(loaded, inputs), logits(model, inputs)) < 5e-6
    with torch.no_grad():
        merged = loaded.merge_and_unload().eval()
        ours = model.merge_and_unload().eval()
    for name, weight in ours.state_dict().items():
        assert relative(merged.state_dict()[name], weight) < 1e-6, name


def test_export_keeps_ranks_that_differ_and_modules_to_save(tmp_path):
    model = wrapped("encoder", rank_pattern={"value": 5}, modules_to_save=["classifier"])
    blur(model)
    lora = export_lora(model, tmp_path)
    assert set(lora.rank_pattern.values()) == {5} and lora.rank_pattern == lora.alpha_pattern
    loaded = PeftModel.from_pretrained(tiny("encoder"), tmp_path).eval()
    found = logits(loaded, batch("encoder"))
    assert relative(found, logits(model, batch("encoder"))) < 1e-5


def test_export_splits_the_blocks_of_a_fused_weight(tmp_path):
    patterns = {"block_patterns": {"c_attn": "(p d) n -> p d n"}, "block_sizes": {"p": 3}}
    model = wrapped("decoder-conv1d", target_modules=["c_attn"], **patterns)
    blur(model)
    assert export_lora(model, tmp_path).r == 9
    loaded = PeftModel.from_pretrained(tiny("decoder-conv1d"), tmp_path).eval()
    inputs = batch("decoder-conv1d")
    assert relative(logits(loaded, inputs), logits(model, inputs)) < 1e-5


def test_export_of_embeddings_and_convolutions(tmp_path):
    settings = dict(r=3, init="random", target_modules=["0", "2", "4"])
    model = get_peft_model(mlp(), FixedRankConfig(**settings)).eval()
    blur(model)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path).eval()
    x = torch.arange(6).repeat(2, 1) + torch.tensor([[0], [4]])
    assert relative(loaded(x), model(x)) < 1e-5


def lora_of(family, folder, **changes):
    """A LoRA adapter with weights that are not zero, saved; its model."""
    settings = dict(r=3, lora_alpha=6, target_modules=FAMILIES[family].targets)
    settings["fan_in_fan_out"] = family == "decoder-conv1d"
    settings |= {"task_type": FAMILIES[family].task, "init_lora_weights": False} | changes
    model = get_peft_model(tiny(family), LoraConfig(**settings)).eval()
    model.save_pretrained(folder)
    return model


@every_family
@pytest.mark.parametrize("rslora", [False, True])
def test_import_is_exact_at_the_rank_of_the_adapter(family, rslora, tmp_path):
    model = lora_of(family, tmp_path, use_rslora=rslora)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = import_lora(tiny(family), tmp_path).eval()
    wanted = logits(model, batch(family))
    assert relative(logits(found, batch(family)), wanted) < 1e-5
    for triple in (
        t for m in found.modules() if hasattr(m, "triples") for t in m.triples("default")
    ):
        assert (triple.U.mT @ triple.U - torch.eye(triple.rank)).abs().max() < 1e-5


def test_import_above_the_rank_is_exact_and_below_says_what_is_lost(tmp_path):
    model = lora_of("decoder", tmp_path)
    wanted = logits(model, batch("decoder"))
    larger = import_lora(tiny("decoder"), tmp_path, r=7).eval()
    assert relative(logits(larger, batch("decoder")), wanted) < 1e-5
    with pytest.warns(UserWarning, match=r"to rank 1 at .* relative error of 0\.\d"):
        smaller = import_lora(tiny("decoder"), tmp_path, r=1).eval()
    assert relative(logits(smaller, batch("decoder")), wanted) > 1e-4


def test_import_then_export_is_the_same_change(tmp_path):
    model = lora_of("encoder", tmp_path / "a", modules_to_save=["classifier"])
    blur(model)
    model.save_pretrained(tmp_path / "a")
    export_lora(import_lora(tiny("encoder"), tmp_path / "a"), tmp_path / "b")
    loaded = PeftModel.from_pretrained(tiny("encoder"), tmp_path / "b").eval()
    assert relative(logits(loaded, batch("encoder")), logits(model, batch("encoder"))) < 1e-5


@pytest.mark.parametrize("changes, message", [({"use_dora": True}, "use_dora")])
def test_import_refuses_what_is_more_than_a_product(changes, message, tmp_path):
    lora_of("encoder", tmp_path, **changes)
    with pytest.raises(ValueError, match=f"plain LoRA adapter.*{message}"):
        import_lora(tiny("encoder"), tmp_path)


def test_import_refuses_other_methods_missing_and_damaged_files(tmp_path):
    get_peft_model(tiny("encoder"), peft.IA3Config(task_type="SEQ_CLS")).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(ValueError, match="a LoRA adapter, got one of type IA3"):
        import_lora(tiny("encoder"), tmp_path / "ia3")
    lora_of("encoder", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "lora_B" in k)
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(ValueError, match="do not fit together"):
        import_lora(tiny("encoder"), tmp_path / "lora")
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        import_lora(tiny("encoder"), tmp_path / "lora")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        import_lora(tiny("encoder"), tmp_path / "lora")


def test_export_refuses_an_adapter_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="got 'other'; the model has \\['default'\\]"):
        export_lora(wrapped("encoder"), tmp_path, adapter_name="other")
    with pytest.raises(ValueError, match="the model has none"):
        export_lora(nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())
