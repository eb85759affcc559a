"""Steps on the manifold for plain LoRA adapters, whose parameters are two factors B and A.

With W = s B A = U S Vᵀ, A = Vᵀ and s B = U S, the gradients of the factors are ∂L/∂B = s G V and ∂L/∂A = (Gᵀ U S)ᵀ.
The first gives G V as it is. The second is divided by S, damped, where S is small: there Vp is shortened, and at B = 0
only U and S move, as in LoRA itself.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_geo import guard
from lowrank_geo.geometry import Point, project_factors
from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.copies import attributes
from lowrank_geo.optim.groups import by_shape
from lowrank_geo.optim.muon import RiemannianMuon
from lowrank_geo.orthonormal import orthonormalize

RATES = ("lr", "weight_decay")


class Pair(NamedTuple):
    """The factors of one adapter and the point that they are."""

    B: nn.Parameter  # (m, r)
    A: nn.Parameter  # (r, n)
    scaling: float
    point: Point


class LoRAPreconditioned(Optimizer):
    """An optimizer of this package on the LoRA adapters of a model, batched by shape; no new kind of adapter.

    From the start A has orthonormal rows and B is what is left, which is the same B A. Point and state are kept in
    float32 or better, so adapters in bfloat16 lose no small steps. What is trained and no pair of matrices is
    Euclidean.

    Args: optimizer_cls: a `RiemannianOptimizer`, or what makes one of parameter groups. damping: of S, relative to its
        root mean square. settings: of the optimizer.
    Raises: ValueError for a model without trained pairs, and for DoRA, whose weight is no B A; TypeError for
        optimizers of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_cls: Callable[..., RiemannianOptimizer] = RiemannianMuon,
        *,
        lr: float | Tensor,
        euclidean_lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        **settings: Any,
    ) -> None:
        self.pairs = [written(pair) for pair in lora_pairs(model)]
        if not self.pairs:
            raise ValueError(
                "LoRAPreconditioned needs a model with trained lora_A and lora_B matrices, got none; wrap it with "
                "peft.get_peft_model and a LoraConfig"
            )
        self.damping = damping
        factors = [p for pair in self.pairs for p in (pair.B, pair.A)]
        known = {id(p) for p in factors}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        points = [x for pair in self.pairs for x in pair.point]
        guard.mark(points)
        groups: list[dict[str, Any]] = [{"params": points, "geometry": "fixed_rank"}]
        groups += [{"params": rest, "geometry": "euclidean"}] if rest else []
        rates = {} if euclidean_lr is None else {"euclidean_lr": euclidean_lr}
        self.inner = optimizer_cls(groups, lr=lr, weight_decay=weight_decay, **rates, **settings)
        if not isinstance(self.inner, RiemannianOptimizer):
            raise TypeError(
                f"LoRAPreconditioned needs an optimizer of lowrank_geo.optim, got {type(self.inner).__name__}; use "
                "e.g. RiemannianMuon"
            )
        shown = [{"params": factors}] + ([{"params": rest}] if rest else [])
        for group, inner in zip(shown, self.inner.param_groups, strict=True):
            group.update({key: inner[key] for key in RATES})
        super().__init__(shown, {})
        self._show_state()

    def __getstate__(self) -> dict[str, Any]:
        return attributes(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._show_state()  # a copied parameter no longer shares memory with what shows it

    def _show_state(self) -> None:
        """Let the state of the factors be that of their point: the same tensors, changed in place."""
        for pair in self.pairs:
            for owner, names in ((pair.B, "US"), (pair.A, "V")):
                for name in names:
                    part = getattr(pair.point, name)
                    self.state[owner][name] = part.detach()
                    for key, value in self.inner.state[part].items():
                        self.state[owner][f"{name}_{key}"] = value
        for group in self.param_groups[1:]:
            for parameter in group["params"]:
                self.state[parameter] = self.inner.state[parameter]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: group[key] for key in RATES})
        for bucket in self._buckets():
            give_gradients(bucket, self.damping)
        self.inner.step()
        for pair in self.pairs:
            write(pair)
            for part in pair.point:
                part.grad = None
        return loss

    def _buckets(self) -> Iterator[list[Pair]]:
        """The pairs with gradients, by shape."""
        active = {
            id(p.point): p for p in self.pairs if p.A.grad is not None and p.B.grad is not None
        }
        for points in by_shape([pair.point for pair in active.values()]):
            yield [active[id(point)] for point in points]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer; the factors become those of the saved point.

        Raises: ValueError if the state is of other ranks or layers.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for parameter, key in zip(params, keys, strict=True):
            mine, saved = self.state[parameter], state_dict["state"][key]
            for name, value in mine.items():
                if name not in saved or saved[name].shape != value.shape:
                    raise ValueError(
                        f"LoRAPreconditioned.load_state_dict needs {name} of shape {tuple(value.shape)}, got "
                        f"{tuple(saved[name].shape) if name in saved else 'nothing'}; load a state of the same "
                        "optimizer, ranks and layers"
                    )
            for name, value in mine.items():
                value.copy_(saved[name])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for pair in self.pairs:
            write(pair)


def lora_pairs(model: nn.Module) -> Iterator[Pair]:
    """The trained pairs of matrices of PEFT's LoRA layers, found by their names: PEFT need not be installed.

    Raises: ValueError for DoRA.
    """
    for name, module in model.named_modules():
        layer: Any = module
        downs, ups = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if not isinstance(downs, nn.ModuleDict) or not isinstance(ups, nn.ModuleDict):
            continue
        for adapter in downs:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if A.dim() != 2 or not (A.requires_grad and B.requires_grad):
                continue
            if getattr(layer, "use_dora", {}).get(adapter, False):
                raise ValueError(
                    f"LoRAPreconditioned needs plain LoRA, got DoRA at {name!r}; train DoRA with torch.optim.AdamW"
                )
            yield Pair(B, A, float(layer.scaling[adapter]), point_of(B, A, layer.scaling[adapter]))


@torch.no_grad()
def point_of(B: Tensor, A: Tensor, scaling: float) -> Point:
    """s B A as a point of parameters of its own.

    Shapes: B (m, r), A (r, n) -> `Point`.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    B, A = B.detach().to(dtype) * scaling, A.detach().to(dtype)
    V, R = torch.linalg.qr(A.mT)  # A = Rᵀ Vᵀ
    K = B @ R.mT  # s B A = K Vᵀ
    # The same on every process: where B = 0 this is what U starts as.
    drawn = torch.randn(K.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U = orthonormalize(K, torch.linalg.qr(drawn)[0].to(K))
    return Point(*(nn.Parameter(x.contiguous()) for x in (U, U.mT @ K, V)))


def written(pair: Pair) -> Pair:
    """The pair after `write`."""
    write(pair)
    return pair


@torch.no_grad()
def write(pair: Pair) -> None:
    """Make the factors those of the point: A = Vᵀ, B = U S / s."""
    pair.A.copy_(pair.point.V.mT)
    pair.B.copy_(pair.point.U @ pair.point.S / pair.scaling)


def give_gradients(pairs: Iterable[Pair], damping: float) -> None:
    """Set the gradients of the points, of one shape, from those of their factors: tangent coordinates."""
    pairs = list(pairs)
    point = Point(
        *(
            torch.stack([x.detach() for x in column])
            for column in zip(*(p.point for p in pairs), strict=True)
        )
    )
    scaling = torch.tensor([p.scaling for p in pairs]).to(point.S)[:, None, None]
    gB = torch.stack([p.B.grad.to(point.S.dtype) for p in pairs])  # type: ignore[union-attr]
    gA = torch.stack([p.A.grad.to(point.S.dtype) for p in pairs])  # type: ignore[union-attr]
    found = project_factors(point, gB / scaling, divided(gA.mT, point.S, damping))
    for index, pair in enumerate(pairs):
        for part, gradient in zip(pair.point, found, strict=True):
            part.grad = gradient[index]


def divided(KS: Tensor, S: Tensor, damping: float) -> Tensor:
    """K from K S, as K S Sᵀ (S Sᵀ + ε²I)⁻¹ with ε = damping · |S|_F / √r; 0 where S = 0.

    Shapes: KS (L, n, r), S (L, r, r) -> (L, n, r).
    """
    r = S.shape[-1]
    square = S @ S.mT
    mean = torch.diagonal(square, dim1=-2, dim2=-1).mean(-1)[:, None, None]
    shift = torch.where(mean > 0, damping**2 * mean, 1.0)
    identity = torch.eye(r, dtype=S.dtype, device=S.device)
    L, _ = torch.linalg.cholesky_ex(square + shift * identity)
    return torch.cholesky_solve((KS @ S.mT).mT, L).mT
