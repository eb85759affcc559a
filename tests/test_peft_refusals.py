"""Bad input: one sentence as PEFT words them, and nothing half-applied."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft_models import mlp, needs_peft
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_geo.peft import FixedRankConfig
from lowrank_geo.peft.layer import FixedRankLayer
from lowrank_geo.peft.register import method_type


def config(**changes):
    settings = dict(r=3, init="random", target_modules=["2", "4", "6"])
    return FixedRankConfig(**settings | changes)


def untouched(model):
    plain = mlp()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            dict(target_modules=["nothing"]),
            r"Target modules \{'nothing'\} not found in the base model",
        ),
        (
            dict(r=6),
            r"`r` should be .* not larger than 4 for the 4x9 weight of '2', .* passed is 6\.",
        ),
        (
            dict(target_modules=["4", "5"]),
            r"Target module ReLU\(\) is not supported\. Currently, only",
        ),
        (dict(init="gradient"), "`init='gradient'` needs the gradient of '2' .*collect_gradients"),
        (dict(target_modules=None), "Please specify `target_modules` in `peft_config`"),
    ],
)
def test_an_adapter_that_cannot_be_made_leaves_the_model_alone(changes, sentence):
    model = mlp()
    with pytest.raises((ValueError, TypeError), match=sentence):
        get_peft_model(model, config(**changes))
    untouched(model)


@needs_peft(0, 21, "refuses a second adapter of one name")
def test_a_second_adapter_that_cannot_be_made_leaves_the_first_alone():
    model = get_peft_model(mlp(), config()).eval()
    x = torch.randint(0, 11, (7, 6))
    before, flags = model(x), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="not larger than 5"):
        model.add_adapter("other", config(r=4, rank_pattern={"6": 7}))
    assert torch.equal(model(x), before) and list(model.peft_config) == ["default"]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(
        list(m.fixed_rank_r) == ["default"]
        for m in model.modules()
        if isinstance(m, FixedRankLayer)
    )
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", config())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(r=0), "`r` should be a positive integer value but the value passed for 'r' is 0"),
        (dict(r=2.5), "positive integer value .* 2.5"),
        (dict(rank_pattern={"q": -1}), "positive integer value .* for 'q' is -1"),
        (dict(dropout=1.0), r"`dropout` should be in \[0, 1\) but the value passed is 1.0"),
        (dict(scale=0.0), "`scale` should be a positive number but the value passed is 0.0"),
        (dict(scale="2"), "`scale` should be a positive number but the value passed is '2'"),
        (dict(dropout="x"), r"`dropout` should be in \[0, 1\) but the value passed is 'x'"),
        (dict(init="best"), "Unknown `init` 'best'. Please use one of 'zero', 'gradient'"),
        (dict(bias="lora_only"), "Unknown `bias` 'lora_only'. Please use one of 'none', 'all'"),
        (dict(layers_pattern="h"), "`layers_to_transform` must also be specified"),
        (dict(task_type="SORTING"), "Invalid task type: 'SORTING'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**changes)


def test_a_block_pattern_that_names_no_layer_is_warned_of():
    patterns = {"4": "(p d) n -> p d n", "nothing": "(p d) n -> p d n"}
    with pytest.warns(RuntimeWarning, match=r"block_patterns keys did not match .*: \['nothing'\]"):
        get_peft_model(mlp(), config(block_patterns=patterns, block_sizes={"p": 3}))


def test_grouped_convolutions_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="needs groups=1, got 2"):
        get_peft_model(model, config(target_modules=["0"], r=2))
    assert type(model[0]) is nn.Conv2d


@pytest.fixture
def saved(tmp_path):
    get_peft_model(mlp(), config()).save_pretrained(tmp_path)
    return tmp_path


def test_a_damaged_file_is_refused_before_the_model_is_touched(saved):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    model = mlp()
    with pytest.raises(ValueError, match="The adapter weights in '.*safetensors' are damaged"):
        PeftModel.from_pretrained(model, saved)
    untouched(model)


@pytest.mark.parametrize("edit", ["config", "weights"])
def test_ranks_that_the_file_does_not_have_are_refused_before_anything_is_allocated(saved, edit):
    if edit == "config":
        settings = json.loads((saved / "adapter_config.json").read_text())
        settings["r"] = 4
        (saved / "adapter_config.json").write_text(json.dumps(settings))
    else:
        weights = load_file(saved / "adapter_model.safetensors")
        key = next(key for key in weights if key.endswith(".S"))
        weights[key] = torch.zeros(2, 3)
        save_file(weights, saved / "adapter_model.safetensors")
    model = mlp()
    with pytest.raises(ValueError, match="has shape .*, but the configuration says `r` = "):
        PeftModel.from_pretrained(model, saved)
    untouched(model)


def test_a_process_that_does_not_import_the_package_is_told_its_name(saved):
    code = f"""
from peft import PeftModel
from torch import nn
PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2)), {str(saved)!r})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.rstrip().endswith("KeyError: 'LOWRANK_GEO'")
    assert "import lowrank_geo.peft" in (saved / "README.md").read_text()
    assert (
        json.loads((saved / "adapter_config.json").read_text())["import_first"]
        == "lowrank_geo.peft"
    )


def test_a_peft_that_keeps_its_methods_in_another_way_is_named(monkeypatch):
    register = sys.modules[method_type.__module__]
    monkeypatch.setattr(register, "NAME", "ANOTHER")
    monkeypatch.setattr(register, "TABLES", ("_member_map_", "_unknown_table_"))
    with pytest.raises(ImportError, match="needs PeftType to be an enum with .*_unknown_table_"):
        method_type()


def test_the_note_is_written_once(saved):
    get_peft_model(mlp(), config()).save_pretrained(saved)
    assert (saved / "README.md").read_text().count("import lowrank_geo.peft") == 1


def test_other_methods_do_not_mix_in():
    model = get_peft_model(mlp(), config())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["4"]))
    with pytest.raises(ValueError, match="LOWRANK_GEO"):
        PeftMixedModel(mlp(), config(), "default")


def test_only_one_adapter_has_biases():
    model = get_peft_model(mlp(), config(bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", config(bias="all"))


@pytest.mark.parametrize(
    "adapters, weights, combination, sentence",
    [
        (["default", "no"], [1, 1], "svd", "Adapter no does not exist"),
        (
            ["default"],
            [1, 2],
            "svd",
            "Length of `adapters` should be the same .* 1 and 2 respectively",
        ),
        (["default"], [1], "ties", "Invalid combination_type: ties"),
    ],
)
def test_combinations_that_cannot_be_made(adapters, weights, combination, sentence):
    model = get_peft_model(mlp(), config())
    with pytest.raises(ValueError, match=sentence):
        model.add_weighted_adapter(adapters, weights, "sum", combination)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    "weight, rank, sentence",
    [
        (float("nan"), None, r"`weights` should be finite numbers but got \[1.0, nan\]"),
        (1.0, 0, "`svd_rank` should be a positive integer value but the value passed is 0"),
        (1.0, -1, "`svd_rank` should be a positive integer value but the value passed is -1"),
        (1.0, None, "NaNs detected in the weights to combine. The adapter other seems"),
    ],
)
def test_a_sum_that_cannot_be_computed_leaves_no_adapter(weight, rank, sentence):
    model = get_peft_model(mlp(), config())
    model.add_adapter("other", config(r=2))
    if sentence.startswith("NaNs"):
        last = [m for m in model.modules() if isinstance(m, FixedRankLayer)][-1]
        with torch.no_grad():
            last.triples("other")[0].S[0, 0] = float("nan")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=sentence):
        model.add_weighted_adapter(["default", "other"], [1.0, weight], "sum", svd_rank=rank)
    assert list(model.peft_config) == ["default", "other"] and list(model.state_dict()) == keys


def test_an_empty_backward_leaves_no_gradients_behind():
    from lowrank_geo.peft import collect_gradients

    model = mlp()
    with pytest.raises(ValueError, match="got no gradient from `backward`"):
        collect_gradients(model, config(), lambda model: None)
    untouched(model)


@pytest.mark.parametrize("change", ["missing", "not json", "no type", "no weights"])
def test_a_folder_that_is_no_whole_adapter_is_refused(saved, change):
    settings = saved / "adapter_config.json"
    if change == "missing":
        settings.unlink()
    elif change == "not json":
        settings.write_text("{")
    elif change == "no type":
        settings.write_text("{}")
    else:
        (saved / "adapter_model.safetensors").unlink()
    model = mlp()
    with pytest.raises((ValueError, OSError, KeyError)):
        PeftModel.from_pretrained(model, saved)
    if change != "no weights":  # which PEFT notices after it has made the layers
        untouched(model)


def test_adapters_merged_in_the_wrong_order_are_not_unmerged_into_something_else():
    x = torch.randint(0, 11, (7, 6))
    model = get_peft_model(mlp(), config()).eval()
    model.add_adapter("other", config(r=2))
    base = mlp()(x)
    model.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="Already following adapters were merged other"):
        model.merge_adapter(["default", "other"])  # the second is there already
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.allclose(model(x), base, atol=1e-5)
