"""The pre-trained model of a run, and whether what was asked for fits it."""

from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lowrank_geo.finetune.config import FinetuneConfig, model_path
from lowrank_geo.finetune.examples import Examples


def base_model(config: FinetuneConfig, examples: Examples) -> tuple[nn.Module, Any]:
    """The pre-trained model, with a new head if the task needs one, and its tokenizer. Code of a hub is never run.

    Raises: ValueError for what cannot be loaded.
    """
    path = model_path(config.model)
    try:
        return load(path, config, examples)
    except (OSError, ValueError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200].rstrip(".")
        raise ValueError(
            f"--model needs a folder or hub name with a configuration, a tokenizer and weights in safetensors, got "
            f"{path!r} ({reason}); check the name, the files and the network"
        ) from error


def load(path: str, config: FinetuneConfig, examples: Examples) -> tuple[nn.Module, Any]:
    """Model and tokenizer by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
    if config.task == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(path, **settings), tokenizer
    settings["num_labels"] = len(examples.labels)
    model = AutoModelForSequenceClassification.from_pretrained(path, **settings)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def check_fits(model: Any, config: FinetuneConfig) -> None:
    """Raise ValueError for texts longer than a model has positions, and layers that it does not have."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.length > positions:
        raise ValueError(
            f"length needs to be at most {positions}, the positions of this model, got {config.length}; lower it"
        )
    if isinstance(config.target_modules, str):
        return
    layers = {name for name, module in model.named_modules() if not list(module.children())}
    for wanted in config.target_modules:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in layers):
            known = sorted({name.rpartition(".")[2] for name, _ in linear_layers(model)})
            raise ValueError(
                f"targets needs names of layers, got {wanted!r}, which this model does not have; use some of "
                f"{', '.join(known)}"
            )


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear layers of a model by name, Hugging Face's transposed ones too."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
