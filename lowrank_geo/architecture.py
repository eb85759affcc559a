"""How to build the dense model of a saved one again: a transformers class with its config, or our own decoder."""

import copy
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

CONFIG, GENERATION = "config.json", "generation_config.json"


def record_architecture(model: nn.Module, folder: Path) -> dict[str, Any] | None:
    """What `build_architecture` needs, partly as files in `folder`; None for a class that only the caller can build."""
    decoder = sys.modules.get("lowrank_geo.models.decoder")
    if decoder is not None and type(model) is decoder.Decoder:
        sizes: Any = model.config
        return {"library": "lowrank_geo", "class": "Decoder", "config": asdict(sizes)}
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    name = type(model).__name__
    config = copy.deepcopy(model.config)
    config.architectures = [name]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(folder / GENERATION)
    if getattr(sys.modules["transformers"], name, None) is not type(model):
        return None
    return {"library": "transformers", "class": name, "config": _digest(folder / CONFIG)}


def build_architecture(record: dict[str, Any], folder: Path) -> nn.Module:
    """The dense model in evaluation mode, with parameters on `meta` and real buffers. Runs no code from the folder.

    Raises: ValueError for a record or a config that makes no model.
    """
    library, name, config = (record.get(key) for key in ("library", "class", "config"))
    if library == "lowrank_geo" and name == "Decoder" and isinstance(config, dict):
        return _build_decoder(config)
    if library == "transformers" and isinstance(name, str) and isinstance(config, str):
        return _build_transformers(name, config, folder)
    raise ValueError(
        f"load_pretrained needs a class of transformers or our Decoder, got {library!r} {name!r}; "
        "pass the freshly built dense model as `model`"
    )


def skeleton(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, with its parameters on `meta` and its buffers as they are; draws no random numbers."""

    def to_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    # `with torch.device("meta")` would lose the buffers that no file holds, as rotary frequencies.
    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with torch.random.fork_rng(devices=[]):
            return build().eval()
    finally:
        hook.remove()


def _build_decoder(config: dict[str, Any]) -> nn.Module:
    from lowrank_geo.models.decoder import Decoder, DecoderConfig

    try:
        return skeleton(lambda: Decoder(DecoderConfig(**config)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"load_pretrained needs a config that makes a Decoder, got one that does not ({error}); save again"
        ) from None


def _build_transformers(name: str, digest: str, folder: Path) -> nn.Module:
    path = folder / CONFIG
    if not path.is_file() or _digest(path) != digest:
        raise ValueError(
            f"load_pretrained needs the {CONFIG} that belongs to the weights, got another one or none in {folder}; "
            "save again"
        )
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "load_pretrained needs transformers for this model; pip install 'lowrank-geo[peft]'"
        ) from error
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(
            f"load_pretrained needs a model class of transformers {transformers.__version__}, got {name!r}; "
            "install a version that has it, or pass the dense model as `model`"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        model: Any = skeleton(lambda: kind(config))
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"load_pretrained needs a config that makes a {name}, got one that does not ({reason}); save again"
        ) from None
    if (folder / GENERATION).is_file():
        values = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
        model.generation_config = transformers.GenerationConfig.from_dict(values)
    return model


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
