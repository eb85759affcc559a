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
# What constructors raise for sizes that make no model.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


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


def build_architecture(record: dict[str, Any], folder: Path, tensors: int) -> nn.Module:
    """The dense model in evaluation mode, with parameters on `meta` and real buffers. Runs no code from the folder.

    `tensors` is how many the weights file holds: a config of more layers is refused before it is built.
    Raises: ValueError for a record or a config that makes no model.
    """
    library, name, config = (record.get(key) for key in ("library", "class", "config"))
    if library == "lowrank_geo" and name == "Decoder" and isinstance(config, dict):
        return _build_decoder(config, tensors)
    if library == "transformers" and isinstance(name, str) and isinstance(config, str):
        return _build_transformers(name, config, folder, tensors)
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


def _build_decoder(values: dict[str, Any], tensors: int) -> nn.Module:
    from lowrank_geo.models.decoder import Decoder, DecoderConfig

    try:
        config = DecoderConfig(**values)
        _check_depth(config.layers, tensors)
        return skeleton(lambda: Decoder(config))
    except MALFORMED as error:
        raise _no_model("Decoder", error) from None


def _build_transformers(name: str, digest: str, folder: Path, tensors: int) -> nn.Module:
    path = folder / CONFIG
    if not path.is_file() or _digest(path) != digest:
        raise ValueError(
            f"load_pretrained needs the {CONFIG} that belongs to the weights, got another one or none in {folder}; "
            "save again"
        )
    transformers, strict = _transformers()
    kind = _model_class(transformers, name)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if kind.config_class is not type(config):
            raise TypeError(f"it is a {type(config).__name__}")
        _check_depth(getattr(config, "num_hidden_layers", 0), tensors)
        model: Any = skeleton(lambda: kind(config))
    except (*MALFORMED, strict) as error:
        raise _no_model(name, error) from None
    if (folder / GENERATION).is_file():
        model.generation_config = _read_generation(transformers, folder / GENERATION)
    return model


def _read_generation(transformers: Any, path: Path) -> Any:
    try:
        return transformers.GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except MALFORMED as error:
        raise ValueError(
            f"load_pretrained needs a readable {path}, got a file that is corrupt or not ours ({error}); "
            "save the model again"
        ) from None


def _transformers() -> tuple[Any, type[Exception]]:
    """The library, and what its configs raise for a wrong value, which is not a ValueError."""
    try:
        import transformers
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            "load_pretrained needs transformers for this model; pip install 'lowrank-geo[peft]'"
        ) from error
    return transformers, getattr(errors, "StrictDataclassError", ValueError)


def _model_class(transformers: Any, name: str) -> Any:
    kind = getattr(transformers, name, None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    raise ValueError(
        f"load_pretrained needs a model class of transformers {transformers.__version__}, got {name!r}; "
        "install a version that has it, or pass the dense model as `model`"
    )


def _check_depth(layers: Any, tensors: int) -> None:
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(f"it wants {layers} layers of a file of {tensors} tensors")


def _no_model(name: str, error: BaseException) -> ValueError:
    reason = str(error).split("\n")[0].rstrip(".")
    return ValueError(
        f"load_pretrained needs a config that makes a {name}, got one that does not ({reason}); save the model again"
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
