"""The tuner: which layers of a model get an adapter, and what PEFT may do with them."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from lowrank_geo.peft.adapter import Adapter
from lowrank_geo.peft.combination import combine_layers
from lowrank_geo.peft.config import FixedRankConfig
from lowrank_geo.peft.fits import check_base
from lowrank_geo.peft.layer import FixedRankLayer
from lowrank_geo.peft.layer_kinds import layer_class
from lowrank_geo.peft.parameter import ParamWrapper
from lowrank_geo.peft.quantized import quantization_of
from lowrank_geo.peft.register import PREFIX


class FixedRankModel(BaseTuner):
    """A model with fixed-rank adapters; `peft.get_peft_model` makes it from a `FixedRankConfig`."""

    prefix = PREFIX
    tuner_layer_cls = FixedRankLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As in PEFT, but an adapter that cannot be made leaves the model as it was."""
        config: Any = self.peft_config[adapter_name]
        check_base(model, config.stored_shapes)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            remove(model, adapter_name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise
        names = self.targeted_module_names
        used = {get_pattern_key(list(config.block_patterns), name) for name in names}
        if ignored := sorted(config.block_patterns.keys() - used):
            warnings.warn(
                "The following block_patterns keys did not match any targeted module and were ignored: "
                f"{ignored}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        adapter = adapter_for(peft_config, adapter_name, current_key)
        if parameter_name is not None:
            if isinstance(target, ParamWrapper) and target.parameter_name == parameter_name:
                target.add(adapter)
                return
            new: Any = ParamWrapper(target, adapter, parameter_name)
        elif isinstance(target, FixedRankLayer):
            target.add(adapter)
            return
        else:
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            new = layer_class(base)(target, adapter, **quantization_of(self.model))
        if adapter_name not in self.active_adapters:
            new.fixed_rank_delta.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, FixedRankLayer) and not isinstance(new_module, FixedRankLayer):
            # PEFT would hand back a `weight`, which not all layers have.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """As in PEFT, but a merge that is refused changes no layer.

        Raises: ValueError for an unknown adapter, and with `safe_merge` for weights that are not finite.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)

    def _check_merge(self, names: list[str] | None, finite: bool) -> None:
        """Raise ValueError for what cannot be merged, before any layer is."""
        if isinstance(names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
        if unknown := [name for name in names or () if name not in self.peft_config]:
            raise ValueError(f"Adapter {unknown[0]} does not exist")
        for module in self.modules() if finite else ():
            if isinstance(module, FixedRankLayer):
                wanted = module.active_adapters if names is None else names
                with onload_layer(module):
                    module.check_finite([n for n in wanted if n not in module.merged_adapters])

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` to every layer, each name as often as beam search repeats its sample."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_names(names)
        beams = kwargs.get("num_beams") or 1

        def hand_over(layer: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict]:
            x = inputs[0] if inputs else options["input"]
            repeated = [name for name in names for _ in range(beams)]
            options["adapter_names"] = repeated if len(x) == len(repeated) else names
            return inputs, options

        layers = [module for module in self.modules() if isinstance(module, FixedRankLayer)]
        hooks = [layer.register_forward_pre_hook(hand_over, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _check_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {"__base__"}
        for module in self.modules():
            if isinstance(module, FixedRankLayer):
                known |= module.fixed_rank_delta.keys()
        if unknown := {name for name in names if name not in known}:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
            )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """A new adapter Σ wᵢ scaleᵢ ΔWᵢ: its nearest matrix of rank `svd_rank` (default: the largest of the adapters)
        for "svd", or exact, with the sum of the ranks, for "cat".

        Raises: ValueError for unknown adapters or combinations, and numbers of weights that do not fit.
        """
        combine_layers(self, adapters, weights, adapter_name, combination_type, svd_rank)

    def set_adapter_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the configured scale of an adapter by a number, in all layers."""
        for module in self.modules():
            if isinstance(module, FixedRankLayer):
                module.set_scale(adapter_name, scale)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Blocks have names of more parts than PEFT looks at.
        for container in ("delta", "start"):
            key = key.replace(f".{PREFIX}{container}.{adapter_name}.", f".{PREFIX}{container}.")
        return key


def adapter_for(config: FixedRankConfig, name: str, key: str) -> Adapter:
    """What the configuration says about the layer or parameter called `key`."""
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
    blocks = config.blocks_for(get_pattern_key(list(config.block_patterns), key))
    return Adapter(
        name,
        key,
        rank,
        config.scale,
        config.dropout,
        config.init,
        blocks,
        config.inference_mode,
    )


def remove(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of all layers, and the layers out of the model where it was their only one."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, FixedRankLayer) or adapter_name not in module.fixed_rank_r:
            continue
        for container in (*module.adapter_layer_names, *module.other_param_names):
            if adapter_name in getattr(module, container):
                del getattr(module, container)[adapter_name]
        if not module.fixed_rank_r:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
