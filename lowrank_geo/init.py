"""Starting points: the factors of a given weight, or of none."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, check_rank, random


def svd(W: Tensor, rank: int) -> Point:
    """Best rank-r approximation of W, for pre-trained weights; exact at rank = min(m, n).

    Shapes: W (m, n) -> `Point`, S diagonal and descending.
    Raises: ValueError if not 1 <= rank <= min(m, n).
    """
    m, n = W.shape
    check_rank("init.svd", m, n, rank)
    U, sigma, Vt = torch.linalg.svd(working_copy(W), full_matrices=False)
    return Point(U[:, :rank].contiguous(), torch.diag(sigma[:rank]), Vt[:rank].mT.contiguous())


def spectral(W: Tensor, rank: int) -> Point:
    """Truncated SVD of W rescaled to keep |W|_F, so that activations keep their variance; to
    train from scratch.

    Shapes: W (m, n) -> `Point`.
    Source: Khodak et al., Initialization and regularization of factorized neural layers, ICLR 2021.
    """
    U, S, V = svd(W, rank)
    kept = torch.linalg.matrix_norm(S)
    return Point(U, S * (torch.linalg.matrix_norm(working_copy(W)) / kept.clamp_min(1e-30)), V)


def orthogonal(W: Tensor, rank: int) -> Point:
    """Random frames and S = s·I with the Frobenius norm of W: a flat spectrum; to train from
    scratch.

    Shapes: W (m, n) -> `Point`.
    """
    m, n = W.shape
    check_rank("init.orthogonal", m, n, rank)
    W = working_copy(W)
    U, S, V = random(m, n, rank, dtype=W.dtype, device=W.device)
    scale = torch.linalg.matrix_norm(W) / rank**0.5
    return Point(U, torch.eye(rank, dtype=S.dtype, device=S.device) * scale, V)


def working_copy(W: Tensor) -> Tensor:
    """W detached, in float32 or better."""
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))


INITS: dict[str, Callable[[Tensor, int], Point]] = {
    "svd": svd,
    "spectral": spectral,
    "orthogonal": orthogonal,
}


def factorize(W: Tensor, rank: int, init: str) -> Point:
    """The starting point called `init` for the weight W; on `meta`, its shapes only.

    Shapes: W (m, n) -> `Point`.
    Raises: ValueError for an unknown name or a rank out of [1, min(m, n)].

    >>> U, S, V = factorize(torch.eye(4, 3), 3, "svd")
    >>> torch.allclose(U @ S @ V.mT, torch.eye(4, 3), atol=1e-6)
    True
    """
    if init not in INITS:
        raise ValueError(
            f"factorize needs init out of {', '.join(INITS)}, got {init!r}; use one of them"
        )
    if W.is_meta:
        m, n = W.shape
        check_rank("factorize", m, n, rank)
        dtype = torch.promote_types(W.dtype, torch.float32)
        shapes = ((m, rank), (rank, rank), (n, rank))
        return Point(*(torch.empty(shape, device="meta", dtype=dtype) for shape in shapes))
    return INITS[init](W, rank)
