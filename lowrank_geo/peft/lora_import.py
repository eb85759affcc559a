"""A LoRA adapter as the start of a fixed-rank one: B A = U S Vᵀ by the SVD of a core of the size of its rank."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank_geo.geometry import Point
from lowrank_geo.peft.combination import padded, weighted_sum
from lowrank_geo.peft.config import FixedRankConfig
from lowrank_geo.peft.fits import check_base, missing_layers, refuse_missing
from lowrank_geo.peft.layer import FixedRankLayer
from lowrank_geo.peft.lora_export import adapter_layers
from lowrank_geo.peft.stored import DELTA, PEFT, WEIGHTS, shapes_in

EXACT = 1e-5  # relative; above the rounding of the decomposition in float32
PART = re.compile(r"(?P<layer>.+)\.lora_(embedding_)?(?P<factor>[AB])(\.weight)?$")
# What makes the change of a weight something else than alpha / r · B A.
VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
    "arrow_config",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
)


class Pair(NamedTuple):
    """ΔW = B A of one layer; the scaling is in B."""

    B: Tensor  # (m, R)
    A: Tensor  # (R, n)


@torch.no_grad()
def import_lora(
    model: nn.Module, folder: str | Path, *, r: int | None = None, adapter_name: str = "default"
) -> PeftModel:
    """Wrap a model with a fixed-rank adapter that starts as a saved LoRA adapter.

    Exact if r is at least the rank of every B A; None takes the ranks of the file. Otherwise each layer keeps its
    nearest matrix of rank r, and the largest relative error is printed.

    Raises: ValueError for DoRA and other variants, damaged files, and layers and weights that the model does not have;
        it is left as it was then.
    """
    if r is not None and r < 1:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {r}.")
    settings, pairs, others = read_lora(Path(folder))
    check_room(model, pairs, others)
    ranks = {key: len(pair.A) for key, pair in pairs.items()}
    config = FixedRankConfig(
        r=max(ranks.values()) if r is None else r,
        rank_pattern=ranks if r is None else {},
        target_modules=list(ranks),
        modules_to_save=settings.get("modules_to_save"),
        task_type=settings.get("task_type"),
    )
    wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    errors = {
        key: write(layer, adapter_name, pairs[key.removeprefix(PEFT)])
        for key, layer in adapter_layers(wrapped, adapter_name)
    }
    if others:
        set_peft_model_state_dict(wrapped, others, adapter_name=adapter_name)
    worst = max(errors, key=lambda key: errors[key])
    if errors[worst] > EXACT:
        print(
            f"import_lora: rank {r} keeps the nearest matrices; largest relative error of ΔW {errors[worst]:.3g}, "
            f"at {worst.removeprefix(PEFT)}"
        )
    return wrapped


def read_lora(folder: Path) -> tuple[dict[str, Any], dict[str, Pair], dict[str, Tensor]]:
    """The settings, the pairs by layer, and the other tensors of a saved LoRA adapter.

    Raises: ValueError if there is none, or one that is more than B A.
    """
    file, settings_file = folder / WEIGHTS, folder / "adapter_config.json"
    for needed in (file, settings_file):
        if not needed.is_file():
            raise ValueError(f"Can't find '{needed.name}' at '{folder}'")
    settings = read_settings(settings_file)
    refuse_variants(settings, folder)
    shapes_in(file)  # says so if the file is damaged
    halves: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in load_file(file).items():
        if found := PART.match(key):
            layer = found["layer"].removeprefix(PEFT)
            halves.setdefault(layer, {})[found["factor"]] = value.float()
        else:
            others[key] = value
    if not halves or any(len(half) != 2 for half in halves.values()):
        raise ValueError(
            f"The adapter weights in '{file}' have no complete pairs of lora_A and lora_B."
        )
    pairs = {layer: pair_of(layer, half, settings) for layer, half in halves.items()}
    return settings, pairs, others


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in adapter_config.json.

    Raises: ValueError if the file is no JSON object.
    """
    try:
        settings = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"'{file}' is no JSON ({error}). Please save or download the adapter again."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"'{file}' holds no settings by name. Please save or download the adapter again."
        )
    return settings


def check_room(model: nn.Module, pairs: dict[str, Pair], others: dict[str, Tensor]) -> None:
    """Raise ValueError unless the model has all layers of the adapter, in its sizes."""
    refuse_missing(missing_layers(model, pairs))
    shapes = {key: tuple(value.shape) for key, value in others.items()}
    for layer, (B, A) in pairs.items():
        shapes[f"{PEFT}{layer}{DELTA}U"] = tuple(B.shape)
        shapes[f"{PEFT}{layer}{DELTA}V"] = tuple(A.mT.shape)
    check_base(model, shapes)


def refuse_variants(settings: dict[str, Any], folder: Path) -> None:
    """Raise ValueError unless the adapter is plain LoRA."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"The adapter at '{folder}' is of type {settings.get('peft_type')}. Please pass a LORA adapter."
        )
    used = [name for name in VARIANTS if settings.get(name)]
    if settings.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise ValueError(
            f"The LoRA adapter at '{folder}' uses {', '.join(used)}, which is not a change B A of the weights. Please "
            "pass a plain LoRA adapter."
        )


def pair_of(layer: str, half: dict[str, Tensor], settings: dict[str, Any]) -> Pair:
    """B A of a layer with alpha / r, or alpha / √r, in B.

    Raises: ValueError if the two factors do not fit together, or alpha is missing.
    """
    A, B = half["A"].flatten(1), half["B"].flatten(1)
    if B.shape[1] != A.shape[0]:
        raise ValueError(
            f"lora_A and lora_B of '{layer}' have the shapes {tuple(A.shape)} and {tuple(B.shape)}, which do not fit "
            "together. Please save or download the adapter again."
        )
    alphas = settings.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), layer), settings.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise ValueError(
            f"`lora_alpha` of '{layer}' should be a number but adapter_config.json says {alpha!r}. Please save or "
            "download the adapter again."
        )
    rank = len(A)
    return Pair(B * (alpha / (rank**0.5 if settings.get("use_rslora") else rank)), A)


def write(layer: FixedRankLayer, name: str, pair: Pair) -> float:
    """Make B A, or the nearest matrix of its rank, the adapter of a layer; returns the relative error."""
    (triple,) = layer.triples(name)
    factors = Point(pair.B, torch.eye(len(pair.A)), pair.A.mT)
    whole = weighted_sum([factors], [1.0], None)
    point = Point(*(x[:, : triple.rank] for x in (whole.U, whole.S[: triple.rank], whole.V)))
    for parameter, value in zip(triple.point, padded(point, triple.rank), strict=True):
        parameter.copy_(value)
    lost, total = whole.S.diagonal()[triple.rank :].norm(), whole.S.norm()
    return (lost / total.clamp_min(torch.finfo(total.dtype).tiny)).item()
