"""The pre-trained model of a run, and whether what was asked for fits it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lowrank_geo.finetune.config import FinetuneConfig, model_path
from lowrank_geo.finetune.examples import Examples

AUTO = {
    "seq-cls": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "causal-lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
}


def base_model(config: FinetuneConfig, examples: Examples) -> tuple[nn.Module, Any]:
    """The pre-trained model, with a new head if the task needs one, and its tokenizer. Code of a hub is never run.

    Raises: ValueError for what cannot be loaded, and for models that cannot do the task.
    """
    path = model_path(config.model)
    with named_in_errors(path):
        kind = AutoConfig.from_pretrained(path, trust_remote_code=False)
    auto, known = AUTO[config.task]
    if type(kind) not in known:
        raise ValueError(
            f"{config.task} needs a model with a head for it, got {kind.model_type} from {path!r}; use another "
            "model or another --task"
        )
    with named_in_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = load(auto, path, len(examples.labels))
    check_vocabulary(tokenizer, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.task == "causal-lm":
        check_causal(model, path)
    elif model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@contextmanager
def named_in_errors(path: str) -> Iterator[None]:
    """Within, what transformers says of files that cannot be read becomes one sentence."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200].rstrip(".")
        raise ValueError(
            f"--model needs a folder or hub name with a configuration, a tokenizer and weights in safetensors, got "
            f"{path!r} ({reason}); check the name, the files and the network"
        ) from error


def load(auto: Any, path: str, labels: int) -> Any:
    """The model by transformers, with a new head where the saved one is for another number of labels, 0 for none.

    Raises: ValueError if other weights do not have the shapes of the configuration.
    """
    settings: dict[str, Any] = {"num_labels": labels} if labels else {}
    model, found = auto.from_pretrained(
        path,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **settings,
    )
    for key, stored, shape in found["mismatched_keys"]:
        if not labels or shape[0] != labels:
            raise ValueError(
                f"{key} has shape {tuple(stored)} in the file and {tuple(shape)} in the model"
            )
    return model


def check_vocabulary(tokenizer: Any, path: str) -> None:
    """Raise ValueError for the empty tokenizer that transformers makes where the files of one are missing."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"--model needs a tokenizer with a vocabulary, got special tokens alone from {path!r}; add its files"
        )


@torch.no_grad()
def check_causal(model: Any, path: str) -> None:
    """Raise ValueError if the logits of a token depend on later ones, as those of encoders do: they would see it."""
    one, other = (
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        for ids in (torch.tensor([[1, 1, 1, last]]) for last in (1, 2))
    )
    # Experts may round differently in other company.
    rounding = max(1e-4, 4 * torch.finfo(one.dtype).eps)
    if (one - other).abs().max() > rounding * one.abs().max():
        raise ValueError(
            f"causal-lm needs a model that predicts each token from those before it, got {type(model).__name__} from "
            f"{path!r}, which sees later ones; use a decoder, or --task seq-cls"
        )


def check_fits(model: Any, config: FinetuneConfig) -> None:
    """Raise ValueError for texts longer than a model has positions, and layers that it does not have."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.length > positions:
        raise ValueError(
            f"length needs to be at most {positions}, the positions of this model, got {config.length}; lower it"
        )
    if isinstance(config.target_modules, str):
        return
    layers = {name for name, module in model.named_modules() if can_be_adapted(module)}
    for wanted in config.target_modules:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"targets needs names of layers that can be adapted, got {wanted!r}, which this model does not have; "
                f"use some of {', '.join(known)}"
            )


def can_be_adapted(module: nn.Module) -> bool:
    """Whether every method here has adapters for a layer; Hugging Face's transposed linear layers are such too."""
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"
