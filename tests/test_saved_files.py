"""saved_files: one sentence for every file that is not what it says, and the model untouched."""

import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import forge, plain

from lowrank_geo.convert import convert
from lowrank_geo.saved_files import LARGEST_JSON, PLAN, WEIGHTS
from lowrank_geo.saving import load_pretrained, save_pretrained


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved `plain` model."""
    save_pretrained(convert(plain(), ratio=0.25), tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder, edit):
    """Change the tensors of a saved model and keep the rest."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata)


def set_rank(content, rank):
    entry = content["plan"]["entries"][0]
    parameters = rank * (entry["m"] + entry["n"] + rank) + entry["m"]
    content["plan"]["parameters"] += parameters - entry["parameters"]
    entry.update(rank=rank, parameters=parameters)


def set_size(content, m):
    entry = content["plan"]["entries"][0]
    rank, n, bias = entry["rank"], entry["n"], 64
    sizes = {"dense_parameters": m * n + bias, "parameters": rank * (m + n + rank) + bias}
    for key, value in sizes.items():
        content["plan"][key] += value - entry[key]
    entry.update(m=m, **sizes)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


BROKEN = {
    "no plan": (lambda d: (d / PLAN).unlink(), "needs lowrank_plan.json in"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "needs model.safetensors in"),
    "no folder": (shutil.rmtree, "got a folder without it"),
    "empty plan": (lambda d: cut(d / PLAN, 0), "corrupt or not ours"),
    "cut plan": (lambda d: cut(d / PLAN, 100), "corrupt or not ours"),
    "binary plan": (lambda d: (d / PLAN).write_bytes(b"\xff\xfe\x00"), "corrupt or not ours"),
    "deep plan": (lambda d: (d / PLAN).write_text("[" * 10**6), "corrupt or not ours"),
    "foreign plan": (lambda d: (d / PLAN).write_text('{"a": 1}'), "needs the format 'lowrank_geo model'"),
    "list as plan": (lambda d: (d / PLAN).write_text("[1]"), "needs the format"),
    "huge plan": (lambda d: os.truncate(d / PLAN, LARGEST_JSON + 1), "at most"),
    "version": (lambda d: forge(d, lambda c: c.update(version=99)), "of version 1, got 99"),
    "no entries": (lambda d: forge(d, lambda c: c.update(plan={})), "needs an object of"),
    "buffers": (lambda d: forge(d, lambda c: c.update(buffers={"x": "F9"})), "needs buffers of"),
    "empty weights": (lambda d: cut(d / WEIGHTS, 0), "corrupt or not ours"),
    "cut header": (lambda d: cut(d / WEIGHTS, 50), "corrupt or not ours"),
    "cut weights": (lambda d: cut(d / WEIGHTS, -10), "corrupt or not ours"),
    "foreign weights": (lambda d: (d / WEIGHTS).write_bytes(b"PK" * 99), "corrupt or not ours"),
    "edited plan": (
        lambda d: (d / PLAN).write_bytes((d / PLAN).read_bytes() + b" "),
        "lowrank_plan.json and model.safetensors of one save",
    ),
    "other rank": (lambda d: forge(d, lambda c: set_rank(c, 9)), r"'wide.U' of shape \(64, 9\)"),
    "huge size": (lambda d: forge(d, lambda c: set_size(c, 10**12)), "'wide.U' of shape"),
    "factor missing": (lambda d: rewrite(d, lambda t: t.pop("wide.S")), "a tensor 'wide.S'.*, got 'none'"),
    "tensor missing": (lambda d: rewrite(d, lambda t: t.pop("norm.bias")), "a tensor 'norm.bias'"),
    "tensor too many": (
        lambda d: rewrite(d, lambda t: t.update(x=torch.zeros(1))),
        "the tensors of the model only in .*, got 'x'",
    ),
    "half factor": (
        lambda d: rewrite(d, lambda t: t.update({"wide.U": t["wide.U"].half()})),
        "'wide.U' in F64 or F32",
    ),
    "other dtype": (
        lambda d: rewrite(d, lambda t: t.update({"wide.bias": t["wide.bias"].double()})),
        "'wide.bias' in F32 .*, got 'F64'",
    ),
    "other shape": (
        lambda d: rewrite(d, lambda t: t.update({"wide.bias": torch.zeros(63)})),
        r"'wide.bias' of shape \(64,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_refuses_what_is_not_what_it_says_and_leaves_the_model_alone(saved, name):
    breaks, message = BROKEN[name]
    breaks(saved)
    model = plain()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(saved, model)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(("load_pre", "Plan"))
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1])


def test_refuses_frames_that_are_not_orthonormal_for_tangent_gradients(saved):
    model = load_pretrained(saved, plain())
    model["wide"].gradient = "tangent"
    rewrite(saved, lambda t: t.update({"wide.U": 2 * t["wide.U"]}))
    before = model["wide"].U.clone()
    with pytest.raises(ValueError, match="load_pretrained needs orthonormal columns in U"):
        load_pretrained(saved, model)
    assert torch.equal(model["wide"].U, before)
