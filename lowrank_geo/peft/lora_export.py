"""A fixed-rank adapter as plain LoRA: the same change of the weights in two factors, exactly.

The exported adapter has alpha = r, so that its scaling is 1 and ΔW = B A; it needs neither this package nor its import.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_geo.peft.config import FixedRankConfig
from lowrank_geo.peft.deltas import factors_of, kind_of
from lowrank_geo.peft.layer import FixedRankLayer
from lowrank_geo.peft.parameter import ParamWrapper
from lowrank_geo.peft.stored import PEFT, WEIGHTS


@torch.no_grad()
def export_lora(model: PeftModel, folder: str | Path, *, adapter_name: str | None = None) -> Path:
    """Write an adapter as a plain LoRA adapter, which every version of PEFT and every server of LoRA loads.

    Error:  B A is ΔW to rounding. Its rank is r, twice that where a start of pissa is subtracted, b r for b blocks.
    Raises: ValueError for an unknown adapter, adapters of parameters, and trained biases.
    """
    name = chosen(model, adapter_name)
    config: Any = model.peft_config[name]
    layers = adapter_layers(model, name)
    refuse_export(config, layers)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for key, layer in layers:
        B, A = two_factors(layer, name)
        ranks[key.removeprefix(PEFT)] = len(A)
        tensors |= named(key, layer, B, A)
    state = get_peft_model_state_dict(model, adapter_name=name)
    tensors |= {key: value for key, value in state.items() if ".fixed_rank_" not in key}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(plain, target / WEIGHTS, {"format": "pt"})
    transposed = any(kind_of(layer.get_base_layer()) == "conv1d" for _, layer in layers)
    lora_config(config, ranks, transposed).save_pretrained(str(target))
    return target


def chosen(model: PeftModel, name: str | None) -> str:
    """The adapter that is meant, the active one for None.

    Raises: ValueError if there is no fixed-rank adapter of that name, or no single active one.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"export_lora needs a PeftModel, got {type(model).__name__}. Please wrap it with `get_peft_model`."
        )
    active = model.active_adapters if name is None else [name]
    if len(active) != 1:
        raise ValueError(
            f"Cannot export the active adapters {active} as one. Please pass `adapter_name`, or combine them with "
            "`add_weighted_adapter` first."
        )
    if not isinstance(model.peft_config.get(active[0]), FixedRankConfig):
        raise ValueError(f"Adapter {active[0]} does not exist or is not a fixed-rank adapter")
    return active[0]


def adapter_layers(model: nn.Module, name: str) -> list[tuple[str, FixedRankLayer]]:
    """The layers with an adapter, by the names that PEFT gives them."""
    found = [(key, m) for key, m in model.named_modules() if isinstance(m, FixedRankLayer)]
    return [(key, layer) for key, layer in found if name in layer.fixed_rank_delta]


def refuse_export(config: FixedRankConfig, layers: list[tuple[str, FixedRankLayer]]) -> None:
    """Raise ValueError for what LoRA files do not hold."""
    if config.bias != "none":
        raise ValueError(
            f"Cannot export an adapter with `bias={config.bias!r}` as plain LoRA. Please merge the adapter instead."
        )
    if any(isinstance(layer, ParamWrapper) for _, layer in layers):
        raise ValueError(
            "Cannot export an adapter with `target_parameters` as plain LoRA. Please merge the adapter instead."
        )


def two_factors(layer: FixedRankLayer, name: str) -> tuple[Tensor, Tensor]:
    """B and A with B A = scale · (ΔW − start).

    Shapes: -> B (m, R), A (R, n).
    """
    B, A = factors_of(layer.fixed_rank_delta[name])
    if name in layer.fixed_rank_start:
        B0, A0 = factors_of(layer.fixed_rank_start[name])
        B, A = torch.cat([B, -B0], 1), torch.cat([A, A0])
    return layer.fixed_rank_scale[name] * B, A


def named(key: str, layer: FixedRankLayer, B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """The two factors under the names and in the shapes that PEFT stores for a layer of this kind."""
    base: Any = layer.get_base_layer()
    kind = kind_of(base)
    if kind == "embedding":
        return {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
    if kind == "conv2d":
        B, A = B[..., None, None], A.reshape(len(A), base.in_channels, *base.kernel_size)
    return {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}


def lora_config(config: FixedRankConfig, ranks: dict[str, int], transposed: bool) -> LoraConfig:
    """The configuration of the exported adapter: its layers by name, their alphas as large as their ranks."""
    counts = list(ranks.values())
    common = max(counts, key=counts.count)
    others = {key: rank for key, rank in ranks.items() if rank != common}
    exported = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    exported.base_model_name_or_path = config.base_model_name_or_path
    exported.revision = config.revision
    return exported
