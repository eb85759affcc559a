"""What layers of fixed rank share: the weight W = U S Vᵀ as three plain parameters U, S, V."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_geo import guard
from lowrank_geo.branches import Branch, Product, branched
from lowrank_geo.functional import lowrank_linear
from lowrank_geo.geometry import Point, check_rank
from lowrank_geo.gradients import GRADIENTS, Gradient

ORTHONORMAL = 1e-3  # largest |UᵀU − I| of a frame that tangent gradients accept


class LowRankLayer(nn.Module):
    """What `LowRankLinear` and `LowRankConv2d` share: the factors, their precision and the
    meaning of `.grad`.

    U, S, V are float32 or better whatever the model's dtype; the forward pass casts them.
    """

    U: nn.Parameter  # (m, r)
    S: nn.Parameter  # (r, r)
    V: nn.Parameter  # (n, r)
    bias: nn.Parameter | None  # (m)
    second: Branch | None = None  # set, the layer is evaluated between its weight and this point

    def __init__(self, point: Point, bias: Tensor | None) -> None:
        super().__init__()
        check_rank(type(self).__name__, point.U.shape[0], point.V.shape[0], point.S.shape[0])
        self.U, self.S, self.V = (nn.Parameter(x) for x in point)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self._gradient: Gradient = "factors"
        self._mark()

    @property
    def rank(self) -> int:
        return self.S.shape[0]

    @property
    def point(self) -> Point:
        """The weight as a `Point` of the parameters themselves."""
        return Point(self.U, self.S, self.V)

    @property
    def gradient(self) -> Gradient:
        """What backward writes to `.grad`: partial derivatives ("factors") or tangent coordinates
        ("tangent").
        """
        return self._gradient

    @gradient.setter
    def gradient(self, value: Gradient) -> None:
        if value not in GRADIENTS:
            raise ValueError(
                f"gradient needs to be 'factors' or 'tangent', got {value!r}; use one of them"
            )
        if value == "tangent":
            check_orthonormal(self.point, type(self).__name__)
        if value != self._gradient:
            for factor in self.point:
                factor.grad = None  # of the old meaning
        self._gradient = value
        self._mark()

    def _mark(self) -> None:
        guard.place(*self.point)
        (guard.mark if self._gradient == "tangent" else guard.unmark)(self.point)

    def matrix(self) -> Tensor:
        """W as a differentiable (m, n) matrix in the dtype of the bias, if there is one; its gradient
        follows `gradient`.
        """
        identity = torch.eye(self.V.shape[0], dtype=self.V.dtype, device=self.V.device)
        device = self.V.device.type
        available = torch.amp.is_autocast_available(device)  # not on meta
        with torch.autocast(device, enabled=False) if available else nullcontext():
            W = self._evaluate(matrix_product, identity).mT
        return W if self.bias is None else W.to(self.bias.dtype)

    def _evaluate(self, product: Product, x: Tensor) -> Tensor:
        if self.second is None:
            return product(x, self.point, self._gradient)
        return branched(product, x, self.point, self._gradient, self.second)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # copies and unpickled layers are guarded like the original

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        factors = {id(x) for p in self.point for x in (p, p.grad) if x is not None}

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lost = id(tensor) in factors and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if lost else moved

        super()._apply(keep_precision, recurse)
        self._mark()  # the parameters may be new objects
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        before = [(p, p.detach().clone()) for p in self.parameters(recurse=False)]
        names = [name for name, _ in self.named_parameters(recurse=False)]
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._gradient == "tangent":
            try:
                check_orthonormal(self.point, f"load_state_dict of {prefix or 'the layer'}")
            except ValueError as error:
                args[-1].append(str(error))
                for name, (parameter, value) in zip(names, before, strict=True):
                    parameter.data = value
                    setattr(self, name, parameter)
        self._mark()


def matrix_product(x: Tensor, point: Point, gradient: Gradient) -> Tensor:
    return lowrank_linear(x, *point, gradient=gradient)


def check_orthonormal(point: Point, call: str) -> None:
    """Raise ValueError, naming `call`, if U or V is not orthonormal. Reads back to the host;
    skips `meta`.
    """
    for name, frame in (("U", point.U), ("V", point.V)):
        if frame.is_meta:
            continue
        Q = frame.detach()
        error = (
            (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).abs().max().item()
        )
        if not error <= ORTHONORMAL:
            raise ValueError(
                f"{call} needs orthonormal columns in {name} for tangent gradients, got "
                f"|{name}ᵀ{name} − I| = {error:.2g}; retrain or convert again from the dense weight"
            )


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
