"""Dense formulas in float64, written as in the papers. conftest.py makes `oracles` importable."""

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, random


def dense(point: Point) -> Tensor:
    """W = U S Vᵀ in float64."""
    U, S, V = (x.detach().double() for x in point)
    return torch.einsum("...ij,...jk,...lk->...il", U, S, V)


def tangent_projection(point: Point, Z: Tensor) -> Tensor:
    """P_U Z + Z P_V − P_U Z P_V in float64."""
    U, _, V = (x.detach().double() for x in point)
    P, Q, Z = U @ U.mT, V @ V.mT, Z.detach().double()
    return P @ Z + Z @ Q - P @ Z @ Q


def normal_projection(point: Point, Z: Tensor) -> Tensor:
    """(I − P_U) Z (I − P_V) in float64."""
    return Z.double() - tangent_projection(point, Z)


def best_approximation(W: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank, by a dense SVD in float64."""
    P, sigma, Qt = torch.linalg.svd(W.double(), full_matrices=False)
    return (P[..., :rank] * sigma[..., None, :rank]) @ Qt[..., :rank, :]


def polar(X: Tensor) -> Tensor:
    """The orthogonal polar factor, by a dense SVD in float64."""
    P, _, Qt = torch.linalg.svd(X.double(), full_matrices=False)
    return P @ Qt


def damped_sign(X: Tensor, damping: float) -> Tensor:
    """X (XᵀX + ε²I)^(−½) with ε = damping·|X|_F, by a dense SVD in float64; 0 for X = 0."""
    P, sigma, Qt = torch.linalg.svd(X.double(), full_matrices=False)
    epsilon = damping * torch.linalg.vector_norm(sigma, dim=-1, keepdim=True)
    damped = (sigma**2 + epsilon**2).sqrt()
    return (P * torch.where(damped > 0, sigma / damped, sigma)[..., None, :]) @ Qt


def orthonormality(Q: Tensor) -> float:
    """|QᵀQ − I|_max, computed in float64."""
    Q = Q.detach().double()
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype)
    return (Q.mT @ Q - identity).abs().max().item()


def rotation(r: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random element of O(r)."""
    return torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0].to(dtype)


def frame(m, r, dtype=torch.float64):
    return random(m, r, r, dtype=torch.float64).U.to(dtype)


def graded(m, r, condition, dtype):
    """A matrix with singular values from 1 down to 1/condition."""
    sigma = condition ** -torch.linspace(0, 1, r, dtype=torch.float64)
    return ((frame(m, r) * sigma) @ rotation(r)).to(dtype)
