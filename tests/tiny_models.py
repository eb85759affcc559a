"""Models small enough to be built for one test, and the comparison and forgery of saved ones."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_geo.saved_files import DIGEST, PLAN, WEIGHTS


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers from each width to the next."""
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(nn.Linear(n, m, bias) for n, m in pairs))


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def hugging_face(name: str) -> nn.Module:
    """A tiny model of a Hugging Face class, with random weights."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    bert = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=8, **common)
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        config = transformers.BertConfig(
            num_hidden_layers=2, max_position_embeddings=8, **bert, **common
        )
        return transformers.BertForMaskedLM(config)
    config = transformers.LlamaConfig(num_hidden_layers=2, **bert, **common)
    return transformers.LlamaForCausalLM(config)


def plain() -> nn.Module:
    """A model of no class that we could build, with a tied weight, a convolution and buffers."""
    model = nn.ModuleDict({"embed": nn.Embedding(40, 32), "wide": nn.Linear(32, 64)})
    model["conv"], model["norm"] = nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16)
    model["head"] = nn.Linear(32, 40, bias=False)
    model["head"].weight = model["embed"].weight
    return model


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have the same tensors bit for bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def forge(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of a saved model and sign it, as an attacker would."""
    content = json.loads((folder / PLAN).read_text())
    edit(content)
    (folder / PLAN).write_text(json.dumps(content))
    digest = hashlib.sha256((folder / PLAN).read_bytes()).hexdigest()
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {DIGEST: digest})
