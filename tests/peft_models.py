"""Tiny models of the four families that PEFT is used with, and a batch for each."""

from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from lowrank_geo.peft import FixedRankConfig

PEFT = tuple(map(int, peft.__version__.split(".")[:2]))
VOCABULARY = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def needs_peft(major: int, minor: int, reason: str) -> pytest.MarkDecorator:
    """Skips what an older PEFT does not do; .ci/peft-matrix runs the tests with two of them."""
    return pytest.mark.skipif(PEFT < (major, minor), reason=f"PEFT {major}.{minor}: {reason}")


class Family(NamedTuple):
    """How to build a model of a family, what to adapt in it, and which task PEFT calls it."""

    model: type
    config: type
    settings: dict
    targets: list[str]
    task: str


FAMILIES = {
    "encoder": Family(
        transformers.BertForSequenceClassification,
        transformers.BertConfig,
        dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2),
        ["query", "value", "dense"],
        "SEQ_CLS",
    ),
    "decoder": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2),
        ["q_proj", "v_proj", "down_proj"],
        "CAUSAL_LM",
    ),
    "decoder-conv1d": Family(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        dict(n_embd=32, n_head=2, n_layer=2, n_positions=32),
        ["c_attn", "c_proj"],
        "CAUSAL_LM",
    ),
    "encoder-decoder": Family(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        dict(d_model=32, d_kv=16, d_ff=64, num_heads=2, num_layers=2, decoder_start_token_id=0),
        ["q", "v", "wo"],
        "SEQ_2_SEQ_LM",
    ),
    "vision": Family(
        transformers.ViTForImageClassification,
        transformers.ViTConfig,
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
        ),
        ["q_proj", "v_proj", "fc1", "projection"],
        None,
    ),
}
GENERATING = ("decoder", "decoder-conv1d", "encoder-decoder")


def tiny(name: str, **changes) -> nn.Module:
    """The model of a family, the same at every call, without dropout; `changes` of its sizes."""
    family = FAMILIES[name]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    words = {} if name == "vision" else VOCABULARY
    model = family.model(family.config(**family.settings | words | changes))
    torch.set_rng_state(state)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def batch(name: str, size: int = 3) -> dict[str, Tensor]:
    """Inputs with labels."""
    generator = torch.Generator().manual_seed(2)
    if name == "vision":
        pixels = torch.randn(size, 1, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(size) % 3}
    ids = torch.randint(3, 40, (size, 6), generator=generator)
    labels = torch.arange(size) % 2 if name == "encoder" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def config(name: str, **changes) -> FixedRankConfig:
    """A configuration that changes the model from the start."""
    settings = dict(r=3, init="random", target_modules=FAMILIES[name].targets)
    return FixedRankConfig(**settings | {"task_type": FAMILIES[name].task} | changes)


def wrapped(name: str, **changes) -> nn.Module:
    """A tiny model with an adapter, in evaluation."""
    return get_peft_model(tiny(name), config(name, **changes)).eval()


def logits(model: nn.Module, inputs: dict[str, Tensor], **options) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


def blur(model: nn.Module) -> None:
    """Move every trained parameter a little, off the orthonormal frames too, as a foreign optimizer would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)


def descent(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict, steps: int) -> list:
    """The losses of some steps on one batch."""
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mlp() -> nn.Sequential:
    """Layers of every kind that can be adapted: embedding, convolution, linear."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Embedding(11, 16, padding_idx=0),
        nn.Unflatten(1, (1, 6)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(4 * 6 * 16, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    )
