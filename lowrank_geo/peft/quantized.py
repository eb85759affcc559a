"""Reading and writing the weight of a base layer, dequantised where PEFT knows how."""

from typing import Any

import torch
from torch import Tensor, nn

try:  # PEFT 0.21 made one place of its quantisation back-ends
    from peft.utils import quantization_utils
except ImportError:
    quantization_utils = None  # type: ignore[assignment]


def backend_of(base: nn.Module, **quantization: Any) -> Any:
    """PEFT's back-end for a quantised layer, None for a plain one and where PEFT has none."""
    if quantization_utils is None:
        return None
    return quantization_utils.resolve_quantization_backend(base, **quantization)


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """What PEFT needs to know of the model to quantise a merged weight again."""
    return {} if quantization_utils is None else quantization_utils.get_quantization_kwargs(model)


def read_weight(base: nn.Module, backend: Any) -> Tensor:
    """The weight in floating point, not to be written to.

    Raises: ValueError for a quantised weight that cannot be dequantised.
    """
    if backend is not None:
        if not backend.supports_merge:
            raise ValueError(
                f"The weights of the quantization backend {backend.backend_name} cannot be dequantized, which merging "
                "and `init='pissa'` need. Please use `init='zero'` and keep the adapter unmerged."
            )
        unpack(base)
        return backend.get_base_weight(base)
    weight = base.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"Cannot read the weights of {type(base).__name__} as floating point, which merging and `init='pissa'` "
            "need. Please use `init='zero'` and keep the adapter unmerged."
        )
    return weight.detach()


def unpack(base: Any) -> None:
    """Undo the layout that bitsandbytes' 4-bit layers get when they are evaluated on some CPUs.

    Its own dequantisation, which PEFT calls, reads that layout as if it were the plain one.
    """
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base.state_dict()  # where bitsandbytes restores the plain layout, in place


@torch.no_grad()
def write_weight(layer: Any, weight: Tensor) -> None:
    """Make `weight` that of the base layer, quantised if it was."""
    if layer.quantization_backend is not None:
        layer.quantization_backend.set_base_weight(layer, weight)
    else:
        layer.get_base_layer().weight.data = weight
