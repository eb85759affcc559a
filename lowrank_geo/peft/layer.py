"""The layer that PEFT puts around one of the model: y = base(x) + scale · x ΔWᵀ for every active adapter.

Each adapter is a low-rank layer of this package in `fixed_rank_delta`, so that parameter groups, guards and diagnostics
find its triple like any other.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.peft.adapter import Adapter, check_fits
from lowrank_geo.peft.deltas import (
    layers_of,
    make_delta,
    matrix_of,
    sizes_of,
    split_rows,
    to_layout,
    to_matrix,
)
from lowrank_geo.peft.initial import STARTS, take_gradient
from lowrank_geo.peft.quantized import backend_of, read_weight, write_weight


class FixedRankLayer(nn.Module, BaseTunerLayer):
    """What the layers for linear, embedding and convolution share; the kinds differ in their changes alone."""

    adapter_layer_names = ("fixed_rank_delta",)
    other_param_names = (
        "fixed_rank_r",
        "fixed_rank_scale",
        "fixed_rank_dropout",
        "fixed_rank_start",
    )

    def __init__(self, base_layer: nn.Module, adapter: Adapter, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = backend_of(base, **quantization)
        self.out_features, self.in_features = sizes_of(base)
        self.fixed_rank_r: dict[str, int] = {}
        self.fixed_rank_scale: dict[str, float] = {}
        self.fixed_rank_dropout = nn.ModuleDict()
        self.fixed_rank_delta = nn.ModuleDict()
        self.fixed_rank_start = nn.ModuleDict()  # frozen, what is subtracted; of pissa only
        self._configured: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter.name
        self.add(adapter)

    def add(self, adapter: Adapter) -> None:
        """Give this layer one more adapter.

        Raises: ValueError for a rank that does not fit, or a start that this layer cannot have.
        """
        base = self.get_base_layer()
        check_fits(adapter, self.out_features, self.in_features)
        blocks = split_rows(self._to_start_from(adapter), adapter.blocks)
        for block in blocks:
            check_fits(adapter, *block.shape)
        points = [STARTS[adapter.init](block, adapter.rank) for block in blocks]
        self.fixed_rank_r[adapter.name] = adapter.rank
        self.fixed_rank_scale[adapter.name] = self._configured[adapter.name] = adapter.scale
        dropout = nn.Dropout(adapter.dropout) if adapter.dropout > 0 else nn.Identity()
        self.fixed_rank_dropout[adapter.name] = dropout
        self.fixed_rank_delta[adapter.name] = make_delta(base, points, adapter.blocks)
        if adapter.init == "pissa":
            start = make_delta(
                base, [type(p)(*(x.clone() for x in p)) for p in points], adapter.blocks
            )
            self.fixed_rank_start[adapter.name] = start.requires_grad_(False)
        self._move_adapter_to_device_of_base_layer(adapter.name)
        self.set_adapter(self.active_adapters, inference_mode=adapter.inference)

    def _to_start_from(self, adapter: Adapter) -> Tensor:
        base: Any = self.get_base_layer()
        if adapter.init == "gradient":
            return take_gradient(base, adapter.layer)
        if adapter.init == "pissa":
            return to_matrix(read_weight(base, self.quantization_backend), base) / adapter.scale
        dtype: Any = base.weight.dtype if hasattr(base, "weight") else torch.float32
        dtype = dtype if dtype.is_floating_point else torch.float32
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As in PEFT, but the factors keep their precision: rounded to that of the base, frames are not orthonormal."""
        weight = next(iter(self.get_base_layer().parameters()), None)
        device = device or (None if weight is None else weight.device)
        for changes in (self.fixed_rank_delta, self.fixed_rank_start):
            if device is None or device.type == "meta" or adapter_name not in changes:
                continue
            if not any(p.is_meta for p in changes[adapter_name].parameters()):
                changes[adapter_name].to(device)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        active = [name for name in self.active_adapters if name in self.fixed_rank_delta]
        if active and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in active:
            result = self._add(name, x, result)
        return result

    def _add(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        return result + self._change(name, x, like=result)

    def _change(self, name: str, x: Tensor, *, like: Tensor) -> Tensor:
        """scale · x ΔWᵀ in the precision of `like`."""
        if x.is_floating_point():
            x = self.fixed_rank_dropout[name](x)
        change = self.fixed_rank_delta[name](x)
        if name in self.fixed_rank_start:
            change = change - self.fixed_rank_start[name](x)
        scale = self.fixed_rank_scale[name]
        change = change if scale == 1 else scale * change
        return change.to(like.dtype)

    def _mixed(self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor:
        """Each sample with the adapter that is named for it, "__base__" for none."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs)
        for name in sorted(set(adapter_names) & set(self.fixed_rank_delta)):
            rows = [index for index, wanted in enumerate(adapter_names) if wanted == name]
            change = self._change(name, x[rows], like=result)
            result = result.index_add(0, torch.tensor(rows, device=x.device), change)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the weight, in the layout of the base layer and the precision of the factors."""
        delta = matrix_of(self.fixed_rank_delta[adapter])
        if adapter in self.fixed_rank_start:
            delta = delta - matrix_of(self.fixed_rank_start[adapter])
        return to_layout(self.fixed_rank_scale[adapter] * delta, self.get_base_layer())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight of the base layer, all active ones for None.

        Raises: ValueError with `safe_merge` if the result is not finite; nothing is changed then.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if safe_merge:
            self.check_finite(names)
        for name in names:
            if name in self.fixed_rank_delta:
                self._write(self._with([name], 1))
                self.merged_adapters.append(name)

    def check_finite(self, names: Sequence[str]) -> None:
        """Raise ValueError unless the weight stays finite when these adapters are merged in turn."""
        mine = [name for name in names if name in self.fixed_rank_delta]
        for count, name in enumerate(mine, 1):
            if not torch.isfinite(self._with(mine[:count], 1)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )

    def unmerge(self) -> None:
        """Take merged adapters out of the weight of the base layer again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.fixed_rank_delta:
                self._write(self._with([name], -1))

    def _with(self, names: Sequence[str], sign: int) -> Tensor:
        weight = read_weight(self.get_base_layer(), self.quantization_backend)
        change: Any = sum(self.get_delta_weight(name) for name in names)
        # The sum is rounded to the precision of the weight once.
        return (weight + sign * change.to(weight.device)).to(weight.dtype)

    def _write(self, weight: Tensor) -> None:
        write_weight(self, weight)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the configured scale of an adapter by a number."""
        if adapter in self._configured:
            self.fixed_rank_scale[adapter] = scale * self._configured[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters, as diffusers does."""
        for name in self.active_adapters:
            if name in self.fixed_rank_scale:
                self.fixed_rank_scale[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`: divide, or go back to the configured scale for None."""
        for name in self.active_adapters:
            if name in self.fixed_rank_scale:
                now, configured = self.fixed_rank_scale[name], self._configured[name]
                self.fixed_rank_scale[name] = configured if scale is None else now / scale

    def triples(self, adapter: str) -> list[LowRankLayer]:
        """The low-rank layers of an adapter here: one, or one for each block."""
        return layers_of(self.fixed_rank_delta[adapter]) if adapter in self.fixed_rank_delta else []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ΔW is all that an adapter does, which it is."""
        return True

    def __repr__(self) -> str:
        return "fixed_rank." + super().__repr__()
