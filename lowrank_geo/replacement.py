"""One module in place of another: dense to low-rank and back, and the exchange inside a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_geo.candidates import all_names
from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.geometry import to_dense
from lowrank_geo.layers import LowRankLinear, lowrank_layers
from lowrank_geo.lowrank_layer import LowRankLayer


class TwoFactors(nn.Sequential):
    """Two dense layers, Vᵀ then U S with the bias; `weight` and `bias` read like those of the layer they stand for.

    Code that reads the weight of a submodule, as nn.TransformerEncoderLayer does in evaluation, keeps working.
    """

    transposed = False

    @property
    def weight(self) -> Tensor:
        right, left = self[0]._parameters["weight"], self[1]._parameters["weight"]
        assert right is not None and left is not None
        W = (left.flatten(1) @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])
        return W.mT if self.transposed else W

    @property
    def bias(self) -> nn.Parameter | None:
        return self[1]._parameters["bias"]


def low_rank(dense: nn.Module, rank: int, init: str) -> LowRankLayer:
    """The low-rank layer of a Linear, Conv1D or Conv2d, with its bias, `training` and `requires_grad`."""
    layer: LowRankLayer
    if isinstance(dense, nn.Conv2d):
        layer = LowRankConv2d.from_convolution(dense, rank, init=init)
    else:
        transposed = not isinstance(dense, nn.Linear)
        W = weight_matrix(dense)
        layer = LowRankLinear.from_weight(W, None, rank, init=init, transposed=transposed)
    # The same Parameter, not a copy: a bias may be tied, and belong to an optimizer.
    layer.register_parameter("bias", dense._parameters["bias"])
    for factor in layer.point:
        factor.requires_grad_(weight_matrix(dense).requires_grad)
    return layer.train(dense.training)


def weight_matrix(dense: nn.Module) -> Tensor:
    """The weight of a Linear, Conv1D or Conv2d as it acts on columns.

    Shapes: -> (m, n), with m outputs.
    """
    weight = dense.weight
    assert isinstance(weight, Tensor)
    if isinstance(dense, nn.Conv2d):
        return weight.flatten(1)
    return weight if isinstance(dense, nn.Linear) else weight.mT


def dense(layer: LowRankLayer, dtype: torch.dtype) -> nn.Module:
    """The Linear, Conv1D or Conv2d with the weight of a low-rank layer."""
    W = to_dense(layer.point).detach()
    if isinstance(layer, LowRankConv2d):
        W = W.reshape(-1, layer.in_channels, *layer.geometry.kernel_size)
        return _like(layer, _convolution(layer, layer.out_channels), W, dtype, layer.bias)
    assert isinstance(layer, LowRankLinear)
    if layer.transposed:
        return _like(layer, _conv1d(layer), W.mT, dtype, layer.bias)
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    return _like(layer, linear, W, dtype, layer.bias)


def two_factors(layer: LowRankLayer, dtype: torch.dtype) -> TwoFactors:
    """Vᵀ, a layer to r features or channels, then U S, a layer from them."""
    U, S, V = (factor.detach() for factor in layer.point)
    m, n, r = U.shape[0], V.shape[0], layer.rank
    right, left = V.mT, U @ S
    modules: tuple[nn.Module, nn.Module]
    if isinstance(layer, LowRankConv2d):
        modules = _convolution(layer, r), nn.Conv2d(r, m, 1, device="meta")
        right = right.reshape(r, layer.in_channels, *layer.geometry.kernel_size)
        left = left[..., None, None]
    else:
        modules = nn.Linear(n, r, device="meta"), nn.Linear(r, m, device="meta")
    pair = TwoFactors(
        _like(layer, modules[0], right, dtype, None),
        _like(layer, modules[1], left, dtype, layer.bias),
    )
    pair.transposed = isinstance(layer, LowRankLinear) and layer.transposed
    return pair.train(layer.training)


def swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Exchange submodules wherever they appear; the root is returned, not exchanged."""
    for module, names in all_names(model).items():
        if module in new:
            for name in filter(None, names):
                parent, _, child = name.rpartition(".")
                # Not setattr, which a container may override: the exchange of all must not fail halfway.
                model.get_submodule(parent)._modules[child] = new[module]
    return new.get(model, model)


def model_dtype(model: nn.Module) -> torch.dtype | None:
    """The floating dtype of most of the parameters besides the factors, whose dtype is their own."""
    factors = {id(factor) for _, layer in lowrank_layers(model) for factor in layer.point}
    sizes: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if id(p) not in factors and p.is_floating_point():
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _like(
    layer: LowRankLayer,
    module: nn.Module,
    weight: Tensor,
    dtype: torch.dtype,
    bias: nn.Parameter | None,
) -> nn.Module:
    """`module`, made on meta, with a weight and bias of its own."""
    grad = any(factor.requires_grad for factor in layer.point)
    module.register_parameter("weight", nn.Parameter(weight.to(dtype).contiguous(), grad))
    module.register_parameter("bias", bias)
    return module.train(layer.training)


def _convolution(layer: LowRankConv2d, out_channels: int) -> nn.Conv2d:
    geometry = layer.geometry
    left, right, top, bottom = geometry.padding
    even = left == right and top == bottom  # only padding="same" pads unevenly
    mode: Any = "zeros" if geometry.padding_mode == "constant" else geometry.padding_mode
    return nn.Conv2d(
        layer.in_channels,
        out_channels,
        geometry.kernel_size,
        geometry.stride,
        (top, left) if even else "same",
        geometry.dilation,
        padding_mode=mode,
        device="meta",
    )


def _conv1d(layer: LowRankLinear) -> nn.Module:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError as error:
        raise ImportError(
            "to_dense needs transformers for a layer that was its Conv1D; pip install 'lowrank-geo[peft]'"
        ) from error
    with torch.device("meta"):
        return Conv1D(layer.out_features, layer.in_features)
