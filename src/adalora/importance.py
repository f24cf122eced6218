"""How important a triplet is: equations 9 to 13, and a Fisher score, as pure functions of tensors.

Sensitivity I = |θ·∇θ| of every entry is smoothed to Ī, and its deviation |I - Ī| to Ū; both start at zero
without bias correction. As in the authors' code θ is the weight after the optimizer's step, and ∇θ its
gradient as the optimizer saw it, clipped and with the regularizer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import Importance

Agree = Callable[[Tensor], Tensor]  # from this process's verdict to that of all


def update_averages_(
    sensitivity: Tensor,
    uncertainty: Tensor,
    product: Tensor,
    beta1: float,
    beta2: float,
    agree: Agree | None = None,
) -> Tensor:
    """Ī ← β₁Ī + (1-β₁)I, then Ū ← β₂Ū + (1-β₂)|I - Ī| with the new Ī and I = |product|; in place.

    All of one shape; `product` holds θ·∇θ and is used up. Returns whether it was finite, as a bool scalar on
    its device: if it was not, the averages keep every bit. Nothing here waits for the device. Where a process holds
    a part of the entries, `agree` makes the verdict one on all of them.
    """
    with torch.no_grad():
        current = product.abs_()
        finite = current.amax().isfinite() if current.numel() else current.new_ones((), dtype=torch.bool)
        finite = finite if agree is None else agree(finite)
        gate = finite.to(current.dtype)  # 0 stops both averages, if only what it multiplies is a number
        current.nan_to_num_(0.0, 0.0)
        sensitivity.lerp_(current, gate * (1 - beta1))
        current.sub_(sensitivity).abs_()
        uncertainty.lerp_(current, gate * (1 - beta2))
    return finite


def entry_scores(sensitivity: Tensor, uncertainty: Tensor, kind: Importance) -> Tensor:
    """s(w) of each entry: Ī·Ū (equation 13), or Ī alone, which is what the authors' selector calls s = I."""
    return sensitivity * uncertainty if kind == "sensitivity*uncertainty" else sensitivity


def triplet_scores(A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    """S of equation 9, shape (..., r): s(λ) plus the means of s over the row of A and the column of B.

    A (..., r, in), E (..., r, 1), B (..., out, r) hold the entry scores.
    """
    return E.squeeze(-1) + (A.mean(dim=-1) + B.mean(dim=-2))


def triplet_sums(
    parts: tuple[Tensor, Tensor, Tensor], starts: tuple[int, int, int], shape: tuple[int, int, int]
) -> Tensor:
    """What a part of A, E and B gives to S, (n, r); the sum over all parts is `triplet_scores`.

    The parts are (n, r', in'), (n, r'', 1) and (n, out', r''') of matrices of `shape` (r, out, in); each begins with
    the triplet that `starts` says.
    """
    (A, E, B), (r, out, in_) = parts, shape
    total = E.new_zeros(len(E), r)
    for start, part in zip(starts, (A.sum(dim=-1) / in_, E.sum(dim=-1), B.sum(dim=-2) / out), strict=True):
        total[:, start : start + part.shape[1]] += part
    return total


def update_fisher_(squares: Tensor, weight: Tensor, product: Tensor, beta: float, agree: Agree | None = None) -> Tensor:
    """v ← βv + (1-β)(λ·∂L/∂λ)² and w ← βw + (1-β), in place; all of one shape, `product` holds λ·∂L/∂λ.

    v / w is the average without the bias of its start. Half of it is, to second order and with the empirical Fisher
    information for the curvature, by how much the loss rises without the triplet. Returns whether `product` was
    finite, as a bool scalar on its device: if it was not, both keep every bit. `agree` as in `update_averages_`.
    """
    with torch.no_grad():
        finite = product.isfinite().all() if agree is None else agree(product.isfinite().all())
        step = finite.to(product.dtype) * (1 - beta)
        squares.lerp_(product.nan_to_num(0.0, 0.0, 0.0).square(), step)
        weight.lerp_(torch.ones_like(weight), step)
    return finite


def magnitude_scores(E: Tensor) -> Tensor:
    """|λ| of lora_E (r, 1), shape (r,): the paper's baseline without gradients."""
    return E.detach().abs().view(-1)


def kept_numbers(kind: Importance, triplets: int, parameters: int) -> int:
    """How many numbers a score keeps between steps for so many triplets, which are so many parameters in A, E and B."""
    return {"fisher": 2 * triplets, "magnitude": 0}.get(kind, 2 * parameters)
