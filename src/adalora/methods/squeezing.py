"""LoRA factors cut to a budget: the least singular directions of all matrices go. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..allocation import keep_top


def squeezed(
    factors: Mapping[str, tuple[Tensor, Tensor]], costs: Mapping[str, int], budget: int, density: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """For A (r, in), B (out, r) of each matrix new ones of rank k, with Σ k · cost ≤ budget.

    Each B·A becomes its best approximation of rank k. The directions with the largest σ², or σ² for their cost, of
    all matrices are kept.
    """
    parts = {name: singular(A, B) for name, (A, B) in factors.items()}
    squares = [sigma.square() for _, sigma, _ in parts.values()]
    keeps = keep_top(squares, budget, costs=[costs[name] for name in parts], exponent=1.0 if density else 0.0)
    result = {}
    for (name, (U, sigma, V)), keep in zip(parts.items(), keeps, strict=True):
        own = keep.to(sigma.device)
        root = sigma[own].sqrt()
        result[name] = (root.unsqueeze(1) * V[own], U[:, own] * root)
    return result


def singular(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), σ (k,) descending, V (k, in) with U diag(σ) V = B·A for A (r, in), B (out, r), k ≤ r.

    By thin QR of both factors and the SVD of an r × r matrix; B·A itself is never formed.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, sigma, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, sigma, V @ Q_A.T
