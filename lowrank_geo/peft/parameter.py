"""Adapters for parameters that no linear layer holds, such as the fused weights of experts.

The parameter is replaced by itself plus ΔW while its module runs: one dense sum for each forward pass, which is what
PEFT's own wrapper costs. A matrix gets one triple, a stack of E matrices E of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_geo.geometry import Point
from lowrank_geo.lookup import lowrank_embedding
from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.peft.adapter import Adapter, check_fits
from lowrank_geo.peft.deltas import layers_of
from lowrank_geo.peft.initial import STARTS
from lowrank_geo.peft.layer import FixedRankLayer


class LowRankStack(nn.Module):
    """E matrices of fixed rank, or one.

    Shapes: () -> (E, n, m), or (n, m) for one.
    """

    def __init__(self, points: Sequence[Point], stacked: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Factors(point, None) for point in points)
        self.stacked = stacked

    def forward(self) -> Tensor:
        found = [
            lowrank_embedding(None, *layer.point, gradient=layer.gradient)
            for layer in layers_of(self)
        ]
        return torch.stack(found) if self.stacked else found[0]


class Factors(LowRankLayer):
    """A triple that is no layer of its own."""


class ParamWrapper(FixedRankLayer):
    """Around a module one of whose parameters has adapters. PEFT finds wrappers of parameters by this class name.

    Parameters are (m, n), (E, m, n), or (E, n, m) where the module says `is_transposed`.

    Raises: ValueError for dropout, blocks, starts other than "zero" and "random", and parameters of other dimensions.
    """

    def __init__(self, base_layer: nn.Module, adapter: Adapter, parameter_name: str) -> None:
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        self.base_layer = base_layer
        shape = self.get_param().shape
        if len(shape) not in (2, 3):
            raise ValueError(
                f"fixed_rank.ParamWrapper was initialized with {len(shape)} dimensional Parameter, but only 2d and 3d "
                "are supported."
            )
        m, n = shape[-2:]
        self.turned = len(shape) == 3 and getattr(self.get_base_layer(), "is_transposed", False)
        self.out_features, self.in_features = (n, m) if self.turned else (m, n)
        self.quantization_backend = None
        self.fixed_rank_r, self.fixed_rank_scale = {}, {}
        self.fixed_rank_dropout, self.fixed_rank_delta = nn.ModuleDict(), nn.ModuleDict()
        self.fixed_rank_start = nn.ModuleDict()
        self._configured = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter.name
        self.add(adapter)

    def add(self, adapter: Adapter) -> None:
        """Give this parameter one more adapter."""
        for name, refused in (
            ("dropout", adapter.dropout != 0),
            ("block_patterns", adapter.blocks is not None),
            ("init", adapter.init not in ("zero", "random")),
        ):
            if refused:
                raise ValueError(
                    f"fixed_rank.ParamWrapper does not work with {name}={getattr(adapter, name, '…')!r}. "
                    f"Please leave it at its default, or target the layer in `target_modules`."
                )
        check_fits(adapter, self.out_features, self.in_features)
        parameter = self.get_param()
        count = parameter.shape[0] if parameter.dim() == 3 else 1
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        like = torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        points = [STARTS[adapter.init](like, adapter.rank) for _ in range(count)]
        self.fixed_rank_r[adapter.name] = adapter.rank
        self.fixed_rank_scale[adapter.name] = self._configured[adapter.name] = adapter.scale
        self.fixed_rank_dropout[adapter.name] = nn.Identity()
        self.fixed_rank_delta[adapter.name] = LowRankStack(points, parameter.dim() == 3)
        self._move_adapter_to_device_of_base_layer(adapter.name, parameter.device)
        self.set_adapter(self.active_adapters, inference_mode=adapter.inference)

    def get_param(self) -> Tensor:
        """The parameter itself, without adapters."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("fixed_rank.ParamWrapper does not support mixed batch inference.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.fixed_rank_delta]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        parameter = self.get_param()
        total = parameter
        for name in active:
            total = total + self._change_of_parameter(name).to(parameter.dtype)
        return functional_call(self.base_layer, {self._path(): total}, args, kwargs)

    def _path(self) -> str:
        """The parameter as the wrapped module calls it, through the wrappers between."""
        path: str = self.parameter_name
        module: Any = self.base_layer
        while hasattr(module, "base_layer"):
            path, module = f"base_layer.{path}", module.base_layer
        return path

    def _change_of_parameter(self, name: str) -> Tensor:
        change = self.fixed_rank_scale[name] * self.fixed_rank_delta[name]()
        return change if self.turned else change.mT

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the parameter, in its layout."""
        return self._change_of_parameter(adapter)

    def _with(self, names: Sequence[str], sign: int) -> Tensor:
        parameter = self.get_param().detach()
        change: Any = sum(self.get_delta_weight(name) for name in names)
        return (parameter + sign * change).to(parameter.dtype)

    def _write(self, weight: Tensor) -> None:
        self.get_param().data = weight

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without wrappers, their adapters merged into it or not; PEFT calls this."""
        module: Any = self
        while isinstance(module, ParamWrapper):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.base_layer
        return module
