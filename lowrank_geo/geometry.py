"""The manifold of m×n matrices of rank r with its embedded metric: points, tangent vectors,
projections.

A point is W = U S Vᵀ, with orthonormal U (m, r), V (n, r) and a full, not diagonal, S (r, r). A
tangent vector is ξ = U M Vᵀ + Up Vᵀ + U Vpᵀ with UᵀUp = 0 and VᵀVp = 0 (the gauge). Every
function takes leading batch dimensions; S is never inverted, so it may be singular or zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """W = U S Vᵀ. U and V have orthonormal columns; S is any r×r matrix."""

    U: Tensor  # (..., m, r)
    S: Tensor  # (..., r, r)
    V: Tensor  # (..., n, r)


class Tangent(NamedTuple):
    """ξ = U M Vᵀ + Up Vᵀ + U Vpᵀ at a `Point`."""

    Up: Tensor  # (..., m, r), UᵀUp = 0
    M: Tensor  # (..., r, r)
    Vp: Tensor  # (..., n, r), VᵀVp = 0


def to_dense(point: Point) -> Tensor:
    """The matrix W = U S Vᵀ.

    Shapes: U (..., m, r), S (..., r, r), V (..., n, r) -> (..., m, n).

    >>> p = Point(torch.eye(3, 1), torch.tensor([[2.0]]), torch.eye(2, 1))
    >>> to_dense(p)
    tensor([[2., 0.], [0., 0.], [0., 0.]])
    """
    U, S, V = point
    return U @ S @ V.mT


def embed(point: Point, xi: Tangent) -> Tensor:
    """The ambient matrix of the tangent vector `xi` at `point`.

    Shapes: as `Point` and `Tangent` -> (..., m, n).
    """
    U, _, V = point
    return (U @ xi.M + xi.Up) @ V.mT + U @ xi.Vp.mT


def project(point: Point, Z: Tensor) -> Tangent:
    """Nearest tangent vector at `point` to the ambient matrix `Z`, in the Frobenius norm.

    Shapes: U (..., m, r), V (..., n, r), Z (..., m, n) -> Up (..., m, r), M (..., r, r), Vp (...,
        n, r).
    Error:  |UᵀUp| and |VᵀVp| stay below about r·eps(dtype)·|Z|.
    Raises: ValueError if Z does not have the shape of W.
    Source: Vandereycken, Low-rank matrix completion by Riemannian optimization, SIAM J. Optim.
        23(2), 2013.
    """
    U, _, V = point
    shape = (*torch.broadcast_shapes(U.shape[:-2], V.shape[:-2]), U.shape[-2], V.shape[-2])
    if Z.shape != shape:
        raise ValueError(
            f"project needs Z of the shape of W, {shape}, got {tuple(Z.shape)}; transpose or reshape Z"
        )
    return project_factors(point, Z @ V, Z.mT @ U)


def project_factors(point: Point, ZV: Tensor, ZtU: Tensor) -> Tangent:
    """Projection of an ambient Z of which only Z V and Zᵀ U are known.

    Shapes: ZV (..., m, r), ZtU (..., n, r) -> Up (..., m, r), M (..., r, r), Vp (..., n, r).
    """
    U, _, V = point
    M = U.mT @ ZV
    return Tangent(minus(ZV, U, M), M, minus(ZtU, V, V.mT @ ZtU))


def gauge(point: Point, xi: Tangent) -> Tangent:
    """`xi` with the parts of Up in span(U) and of Vp in span(V) removed; M is kept.

    Shapes: as `Tangent`.
    """
    U, _, V = point
    return Tangent(minus(xi.Up, U, U.mT @ xi.Up), xi.M, minus(xi.Vp, V, V.mT @ xi.Vp))


def inner(xi: Tangent, eta: Tangent) -> Tensor:
    """⟨ξ, η⟩ = tr(MᵀM') + tr(UpᵀUp') + tr(VpᵀVp'): the Frobenius product of the embedded matrices.

    Shapes: two tangents at one point -> (...).
    """
    return sum_of([(a * b).sum((-2, -1)) for a, b in zip(xi, eta, strict=True)])


def magnitude(X: Tensor) -> Tensor:
    """The largest |entry| of each matrix, without a copy of X.

    Shapes: (..., m, r) -> (..., 1, 1).
    """
    return torch.maximum(X.amax((-2, -1), keepdim=True), -X.amin((-2, -1), keepdim=True))


def norm(xi: Tangent) -> Tensor:
    """|ξ|, the Frobenius norm of the embedded matrix.

    Shapes: a tangent -> (...).
    """
    return torch.linalg.vector_norm(torch.stack([torch.linalg.matrix_norm(x) for x in xi]), dim=0)


def transport(
    point: Point, xi: Tangent, to: Point, overlaps: tuple[Tensor, Tensor] | None = None
) -> Tangent:
    """The projection of `xi`, a tangent at `point`, to the tangent space at `to`: O((m+n)r²),
    never dense.

    A contraction: |Tξ| ≤ |ξ|, with equality only where the two tangent spaces agree on ξ. UᵀU1 and VᵀV1 may be handed
    over by who knows them.

    Shapes: as `Tangent`, both ways; `overlaps` twice (..., r, r).
    """
    U, _, V = point
    U1, _, V1 = to
    Cu, Cv = overlaps or (U.mT @ U1, V.mT @ V1)
    Du, Dv = xi.Up.mT @ U1, xi.Vp.mT @ V1
    right, left = xi.M @ Cv + Dv, xi.M.mT @ Cu + Du  # ξV1 = U·right + Up·Cv, ξᵀU1 = V·left + Vp·Cu
    M = Cu.mT @ right + Du.mT @ Cv  # U1ᵀξV1
    Up = add_(add_(U @ right, xi.Up, Cv), U1, M, alpha=-1)
    return Tangent(Up, M, add_(add_(V @ left, xi.Vp, Cu), V1, M.mT, alpha=-1))


def random(
    m: int,
    n: int,
    r: int,
    *,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Point:
    """A point with Haar-distributed U, V and a standard Gaussian S.

    Shapes: -> U (*batch, m, r), S (*batch, r, r), V (*batch, n, r).
    Raises: ValueError if not 1 <= r <= min(m, n).

    >>> U, S, V = random(6, 4, 2, batch=(3,))
    >>> U.shape, S.shape, V.shape
    (torch.Size([3, 6, 2]), torch.Size([3, 2, 2]), torch.Size([3, 4, 2]))
    """
    check_rank("geometry.random", m, n, r)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, dtype=dtype, device=device, generator=generator)

    # The sign fix of the diagonal of R makes Q Haar-distributed.
    def frame(rows: int) -> Tensor:
        Q, R = torch.linalg.qr(gaussian(rows, r))
        return (Q * torch.diagonal(R, dim1=-2, dim2=-1).sign().unsqueeze(-2)).contiguous()

    return Point(frame(m), gaussian(r, r), frame(n))


def check_rank(call: str, m: int, n: int, r: int) -> None:
    """Raise ValueError, naming `call`, unless 1 <= r <= min(m, n)."""
    if not 1 <= r <= min(m, n):
        raise ValueError(
            f"{call} needs 1 <= rank <= min(m, n) = {min(m, n)} for a {m}x{n} matrix, got {r}; "
            "choose a rank in that range"
        )


def plus(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A + B C, without a copy of the product where torch can.

    Shapes: A (..., m, r), B (..., m, k), C (..., k, r) -> (..., m, r).
    """
    return torch.baddbmm(A, B, C) if A.dim() == B.dim() == C.dim() == 3 else A + B @ C


def minus(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A − B C.

    Shapes: as `plus`.
    """
    if A.dim() == B.dim() == C.dim() == 3:
        return torch.baddbmm(A, B, C, alpha=-1)
    return A - B @ C


def add_(A: Tensor, B: Tensor, C: Tensor, *, alpha: float = 1) -> Tensor:
    """A + α B C, in the memory of A where torch can: for an A that nobody else holds.

    Shapes: as `plus`.
    """
    if A.dim() == B.dim() == C.dim() == 3:
        return A.baddbmm_(B, C, alpha=alpha)
    return A + alpha * (B @ C)


def sum_of(terms: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack(terms).sum(0)
