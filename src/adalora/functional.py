"""The low-rank maps themselves, as functions of tensors.

Shapes: A (r, in) = Q of the paper, E (r, 1) = diagonal of Λ, B (out, r) = P. All return s·ΔW applied to the
input, in the input's dtype; none adds the base output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def delta_matrix(A: Tensor, E: Tensor, B: Tensor, scaling: float) -> Tensor:
    """s · B diag(E) A, shape (out, in): the increment of equation 3."""
    return (B * (E.view(-1) * scaling)) @ A  # (out, r) @ (r, in)


def low_rank_linear(x: Tensor, A: Tensor, E: Tensor, B: Tensor, scaling: float) -> Tensor:
    """s · x Aᵀ diag(E) Bᵀ for x (..., in); returns (..., out)."""
    projected = F.linear(like(x, A), A)  # (..., r)
    return F.linear(_gate(projected, E, scaling), B)


def low_rank_embedding(ids: Tensor, A: Tensor, E: Tensor, B: Tensor, scaling: float, padding_idx: int | None) -> Tensor:
    """Rows `ids` of s · (B diag(E) A)ᵀ for ids (...); returns (..., out). A is (r, num_embeddings)."""
    rows = F.embedding(ids, A.T, padding_idx)  # (..., r)
    return F.linear(_gate(rows, E, scaling), B)


def _gate(projected: Tensor, E: Tensor, scaling: float) -> Tensor:
    # s·E scales r numbers a token here; applied to the output it would pass over all `out` of them. A view and
    # not a transpose: the gradient of E comes out contiguous, as DistributedDataParallel wants it.
    return projected * (E.view(-1) * scaling).to(projected.dtype)  # (..., r)


def like(x: Tensor, weight: Tensor) -> Tensor:
    """x in the dtype that it needs beside `weight`: a bf16 input meets fp32 adapters, unless autocast decides."""
    return x if not x.is_meta and torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
