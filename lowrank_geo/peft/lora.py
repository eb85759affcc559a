"""To and from plain LoRA adapters: scale · U S Vᵀ = B A."""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.utils import set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_geo.geometry import Point
from lowrank_geo.peft.combination import padded, weighted_sum
from lowrank_geo.peft.config import FixedRankConfig
from lowrank_geo.peft.deltas import factors_of, kind_of
from lowrank_geo.peft.layer import FixedRankLayer
from lowrank_geo.peft.parameter import ParamWrapper
from lowrank_geo.peft.stored import WEIGHTS

ROOT = "base_model.model."
# What makes an adapter more than W + scale·B A; each is refused.
BEYOND = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
)


class Pair(NamedTuple):
    """ΔW = B A of one layer, in the layout that LoRA stores for its kind."""

    A: Tensor
    B: Tensor


@torch.no_grad()
def export_lora(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default"
) -> LoraConfig:
    """Write an adapter as a plain LoRA adapter that needs nothing of this package; the scale is in B.

    The change of the weights is the same up to the rounding of one product. Ranks are those of the layers, twice them
    for init="pissa", whose start is subtracted, and the sum over the blocks for fused weights.

    Returns: the LoRA configuration that was written.
    Raises: ValueError for an unknown adapter, and for one on parameters that are in no layer.
    """
    config = _config_of(model, adapter_name)
    layers = {
        name.removeprefix(ROOT): module
        for name, module in model.named_modules()
        if isinstance(module, FixedRankLayer) and adapter_name in module.fixed_rank_delta
    }
    if wrapped := [name for name, m in layers.items() if isinstance(m, ParamWrapper)]:
        raise ValueError(
            f"export_lora needs adapters on layers, got one on the parameter "
            f"'{layers[wrapped[0]].parameter_name}' of '{wrapped[0]}'. Please merge it instead."
        )
    pairs = {name: pair_of(layer, adapter_name) for name, layer in layers.items()}
    ranks = {name: smaller_side(pair) for name, pair in pairs.items()}
    (common, _), *_ = Counter(ranks.values()).most_common(1)
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != common}
    bias: Any = "lora_only" if config.bias == "fixed_rank_only" else config.bias
    kinds = {kind_of(layer.get_base_layer()) for layer in layers.values()}
    lora = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(layers),
        modules_to_save=config.modules_to_save,
        bias=bias,
        fan_in_fan_out=kinds == {"conv1d"},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    tensors = {}
    for name, pair in pairs.items():
        stem = ROOT + name
        if kind_of(layers[name].get_base_layer()) == "embedding":
            tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"] = pair
        else:
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = pair
    tensors.update(_trained_whole(model, adapter_name))
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, target / WEIGHTS)
    lora.save_pretrained(str(target))
    return lora


def pair_of(layer: FixedRankLayer, adapter: str) -> Pair:
    """A and B of one layer with scale·ΔW = B A, shaped as PEFT's LoRA layer of this kind."""
    base: Any = layer.get_base_layer()
    B, A = factors_of(layer.fixed_rank_delta[adapter])
    if adapter in layer.fixed_rank_start:
        B0, A0 = factors_of(layer.fixed_rank_start[adapter])
        B, A = torch.cat([B, -B0], 1), torch.cat([A, A0], 0)
    B = layer.fixed_rank_scale[adapter] * B
    if kind_of(base) == "conv2d":
        return Pair(
            A.reshape(len(A), base.in_channels, *base.kernel_size), B[:, :, None, None].clone()
        )
    return Pair(A, B)


def smaller_side(pair: Pair) -> int:
    """The rank of a pair."""
    return pair.A.shape[0]


def import_lora(
    model: nn.Module,
    folder: str | Path,
    *,
    r: int | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Wrap `model` with a fixed-rank adapter that starts where a LoRA adapter in a local folder is.

    Exact where r is at least the rank of B A; else each ΔW is cut to the nearest matrix of rank r, with a warning that
    says how much of it is lost.

    Args: r: of every layer; None for the rank that each has.
    Raises: ValueError for adapters that are more than B A (DoRA and others), FileNotFoundError without a safetensors
        file.
    """
    lora = PeftConfig.from_pretrained(str(folder))
    _check_plain(lora, folder)
    stored = read_weights(Path(folder))
    points = {name: point_of(pair, lora, name) for name, pair in pairs_in(stored).items()}
    if not points:
        raise ValueError(f"import_lora needs an adapter with LoRA weights, got none in '{folder}'.")
    ranks = {name: _rank(point, r) for name, point in points.items()}
    config = FixedRankConfig(
        r=r or max(ranks.values()),
        target_modules=sorted(points),
        rank_pattern={re.escape(n): rank for n, rank in ranks.items()},
        modules_to_save=lora.modules_to_save,
        task_type=lora.task_type,
    )
    wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    errors = {}
    with torch.no_grad():
        for name, point in points.items():
            layer: Any = wrapped.get_submodule(ROOT + name)
            cut = weighted_sum([point], [1.0], ranks[name])
            errors[name] = _lost(point, ranks[name])
            (triple,) = layer.triples(adapter_name)
            for parameter, value in zip(triple.point, padded(cut, triple.rank), strict=True):
                parameter.copy_(value)
    rest = {k: v for k, v in stored.items() if "lora_" not in k}
    if rest:
        set_peft_model_state_dict(wrapped, rest, adapter_name=adapter_name)
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > 1e-5:
        warnings.warn(
            f"import_lora cut the adapter in '{folder}' to rank {ranks[worst]} at {worst}, a relative error of "
            f"{errors[worst]:.2g} of its ΔW (mean over layers {sum(errors.values()) / len(errors):.2g}). Please "
            "leave `r` out to keep it exact.",
            stacklevel=2,
        )
    return wrapped


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a local adapter.

    Raises: FileNotFoundError without a safetensors file, ValueError for a damaged one.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(
            f"import_lora needs {WEIGHTS} in a local folder, got none in '{folder}'. Please save the adapter with "
            "`safe_serialization=True`, or download it first."
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"The adapter weights in '{file}' are damaged ({error}). Please save or download the adapter again."
        ) from error


def pairs_in(stored: Mapping[str, Tensor]) -> dict[str, Pair]:
    """A and B as matrices by layer name.

    Raises: ValueError for an A without its B, or other ranks.
    """
    found = {}
    for key, A in stored.items():
        match = re.fullmatch(rf"{re.escape(ROOT)}(.*)\.lora_(embedding_)?A(\.weight)?", key)
        if match is None:
            continue
        B = stored.get(
            key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        )
        if B is None or B.shape[1] != A.shape[0]:
            raise ValueError(
                f"The LoRA weights of '{match[1]}' do not fit together: A has shape {tuple(A.shape)}, B "
                f"{None if B is None else tuple(B.shape)}. Please save the adapter again."
            )
        found[match[1]] = Pair(A.flatten(1).float(), B.flatten(1).float())
    return found


def point_of(pair: Pair, lora: Any, name: str) -> Point:
    """scaling · B A as a `Point` of the rank that LoRA has, with frames that are not orthonormal yet.

    Shapes: A (r, n), B (m, r) -> U (m, r), S (r, r), V (n, r).
    """
    rank = pair.A.shape[0]
    alpha = lora.alpha_pattern.get(get_pattern_key(list(lora.alpha_pattern), name), lora.lora_alpha)
    scaling = alpha / (rank**0.5 if lora.use_rslora else rank)
    return Point(pair.B, scaling * torch.eye(rank), pair.A.mT)


def _rank(point: Point, r: int | None) -> int:
    largest = min(point.U.shape[0], point.V.shape[0])
    return min(r or point.S.shape[0], largest)


def _lost(point: Point, rank: int) -> float:
    """|ΔW − its nearest matrix of rank `rank`| / |ΔW|."""
    sigma = torch.linalg.svdvals(
        torch.linalg.qr(point.U)[1] @ point.S @ torch.linalg.qr(point.V)[1].mT
    )
    size = sigma.norm()
    return float(sigma[rank:].norm() / size) if size > 0 else 0.0


def _check_plain(lora: PeftConfig, folder: str | Path) -> None:
    if not isinstance(lora, LoraConfig):
        raise ValueError(
            f"import_lora needs a LoRA adapter, got one of type {getattr(lora.peft_type, 'value', lora.peft_type)} in "
            f"'{folder}'."
        )
    used = [name for name in BEYOND if getattr(lora, name, None)]
    if used:
        raise ValueError(
            f"import_lora needs a plain LoRA adapter, ΔW = scaling·B A, got one with `{used[0]}` in '{folder}'. Please "
            "merge it into the model instead."
        )


def _config_of(model: nn.Module, adapter_name: str) -> FixedRankConfig:
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, FixedRankConfig):
        known = [name for name, c in configs.items() if isinstance(c, FixedRankConfig)]
        raise ValueError(
            f"export_lora needs the name of a fixed-rank adapter, got {adapter_name!r}; the model has "
            f"{known or 'none'}."
        )
    return config


def _trained_whole(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What is saved beside the factors: modules_to_save and biases, under PEFT's names."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: value for key, value in saved.items() if "fixed_rank_" not in key}
