"""The fixed-rank manifold for geoopt: its optimizers, samplers and checks run on packed points.

A point W = U S Vᵀ is one (m+n+r, r) tensor, U above V above S; a tangent vector stacks Up, Vp, M in the same order.
"""

from typing import Any, Literal

import geoopt
import torch
from geoopt.utils import size2shape
from torch import Tensor

from lowrank_geo import geometry, retraction
from lowrank_geo.geometry import Point, Tangent

Metric = Literal["embedded", "product"]
METRICS: tuple[Metric, ...] = ("embedded", "product")


class FixedRank(geoopt.Manifold):
    """m×n matrices U S Vᵀ of rank r, as packed points; batch dimensions come first.

    `metric="product"` expects ordinary partial derivatives in `.grad`. `metric="embedded"`, the metric of R^{m×n},
    expects tangent coordinates, as `lowrank_linear(..., gradient="tangent")` writes them. In both, ⟨u, v⟩ is the sum of
    products of the packed entries, S is never inverted, and the weight decay of geoopt's optimizers acts on S alone.

    Shapes: x (..., m+n+r, r).
    Raises: ValueError if not 1 <= r <= min(m, n), or for an unknown metric.

    >>> manifold = FixedRank(6, 4, 2)
    >>> x = manifold.random()
    >>> manifold.check_point_on_manifold(x), manifold.unpack(x).V.shape
    (True, torch.Size([4, 2]))
    """

    name = "FixedRank"
    ndim = 2
    reversible = False

    def __init__(self, m: int, n: int, r: int, metric: Metric = "embedded") -> None:
        super().__init__()
        geometry.check_rank("FixedRank", m, n, r)
        if metric not in METRICS:
            raise ValueError(
                f"FixedRank needs metric 'embedded' or 'product', got {metric!r}; use one of them"
            )
        self.m, self.n, self.r, self.metric = m, n, r, metric

    def pack(self, triple: Point | Tangent) -> Tensor:
        """One tensor of a point or of a tangent vector.

        Shapes: (..., m, r), (..., r, r), (..., n, r) -> (..., m+n+r, r).
        """
        left, core, right = triple
        return torch.cat([left, right, core], -2)

    def unpack(self, x: Tensor) -> Point:
        """The factors of a packed point, as views.

        Shapes: (..., m+n+r, r) -> `Point`.
        """
        U, V, S = x.split([self.m, self.n, self.r], -2)
        return Point(U, S, V)

    def unpack_tangent(self, u: Tensor) -> Tangent:
        """The coordinates of a packed tangent vector, as views.

        Shapes: (..., m+n+r, r) -> `Tangent`.
        """
        return Tangent(*self.unpack(u))

    def pack_point(self, *tensors: Tensor) -> Tensor:
        return self.pack(Point(*tensors))

    def unpack_tensor(self, tensor: Tensor) -> Point:
        return self.unpack(tensor)

    def projx(self, x: Tensor) -> Tensor:
        """The packed point nearest to x: U and V become their orthogonal polar factors, S stays."""
        U, S, V = self.unpack(x)
        return self.pack(Point(polar(U), S, polar(V)))

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The packed tangent vector at x nearest to u."""
        return self.pack(geometry.gauge(self.unpack(x), self.unpack_tangent(u)))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The Riemannian gradient: ((I − UUᵀ)∂U, ∂S, (I − VVᵀ)∂V), of partial derivatives or tangent coordinates.

        For the embedded metric u is already tangent up to rounding and to geoopt's weight decay.
        """
        return self.proju(x, u)

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        return (u * (u if v is None else v)).sum((-2, -1), keepdim=keepdim)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """`retraction.orthographic` (embedded) or `retraction.polar` (product); u = 0 gives x back bit for bit."""
        point = self.unpack(x)
        # RiemannianSGD of geoopt starts its momentum from the raw gradient, which is not tangent.
        step = geometry.gauge(point, self.unpack_tangent(u))
        move = retraction.retract if self.metric == "embedded" else retraction.polar
        new = move(point, step)
        return self.pack(retraction.keep_if_zero(point, step, new))

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The retraction, not the exponential map, which has no closed form for the embedded metric."""
        return self.retr(x, u)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Projection of v to the tangent space at y: of its matrix (embedded) or of its factors (product).

        The product metric compares frames entry by entry, so y has to come from `retr`, which does not rotate them.
        """
        if self.metric == "product":
            return self.proju(y, v)
        at, to = self.unpack(x), self.unpack(y)
        return self.pack(geometry.transport(at, self.unpack_tangent(v), to))

    def random(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **_: Any,
    ) -> Tensor:
        """Haar-distributed U, V and a standard Gaussian S; `size` is the packed shape, by default one point."""
        batch = self._batch(size)
        point = geometry.random(self.m, self.n, self.r, batch=batch, dtype=dtype, device=device)
        return geoopt.ManifoldTensor(self.pack(point), manifold=self)

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """The first r columns of the identity for U and V, S = I; `seed` is not needed."""
        batch, r = self._batch(size), self.r
        U, V, S = (torch.eye(k, r, dtype=dtype, device=device) for k in (self.m, self.n, r))
        packed = self.pack(Point(U, S, V)).expand(*batch, -1, -1).clone()
        return geoopt.ManifoldTensor(packed, manifold=self)

    def _batch(self, size: tuple[int, ...]) -> tuple[int, ...]:
        shape = size2shape(*size) if size else (self.m + self.n + self.r, self.r)
        self._assert_check_shape(shape, "size")
        return tuple(shape[:-2])

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        expected = (self.m + self.n + self.r, self.r)
        if tuple(shape[-2:]) != expected:
            return False, f"`{name}` should end in shape {expected}, got {tuple(shape)}"
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        U, S, V = self.unpack(x)
        stiefel = geoopt.EuclideanStiefel()
        for name, frame in (("U", U), ("V", V)):
            if not stiefel.check_point_on_manifold(frame, atol=atol, rtol=rtol):
                return False, f"`{name}ᵀ{name} != I` with atol={atol}, rtol={rtol}"
        if not S.isfinite().all():
            return False, "`S` has entries that are not finite"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        U, _, V = self.unpack(x)
        Up, _, Vp = self.unpack_tangent(u)
        for name, part in (("UᵀUp", U.mT @ Up), ("VᵀVp", V.mT @ Vp)):
            if not torch.allclose(part, torch.zeros_like(part), atol=atol, rtol=rtol):
                return False, f"`{name} != 0` with atol={atol}, rtol={rtol}"
        return True, None

    def extra_repr(self) -> str:
        return f"m={self.m}, n={self.n}, r={self.r}, metric={self.metric!r}"


def polar(A: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to A, also where A is rank deficient.

    Shapes: (..., m, r) -> (..., m, r).
    """
    P, _, Qt = torch.linalg.svd(A, full_matrices=False)
    return P @ Qt
