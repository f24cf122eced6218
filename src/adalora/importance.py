"""How important a triplet is: equations 9 to 13, as pure functions of tensors.

Sensitivity I = |θ·∇θ| of every entry is smoothed to Ī, and its deviation |I - Ī| to Ū; both start at zero
without bias correction. As in the authors' code θ is the weight after the optimizer's step, and ∇θ its
gradient as the optimizer saw it, clipped and with the regularizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Importance


def update_averages_(
    sensitivity: list[Tensor],
    uncertainty: list[Tensor],
    weights: list[Tensor],
    gradients: list[Tensor],
    beta1: float,
    beta2: float,
) -> None:
    """Ī ← β₁Ī + (1-β₁)I, then Ū ← β₂Ū + (1-β₂)|I - Ī| with the new Ī; in place, entry by entry.

    The four lists run in parallel; tensors of one position have one shape.
    """
    with torch.no_grad():
        current = list(torch._foreach_mul(weights, gradients))
        torch._foreach_abs_(current)
        torch._foreach_mul_(sensitivity, beta1)
        torch._foreach_add_(sensitivity, current, alpha=1 - beta1)
        torch._foreach_sub_(current, sensitivity)
        torch._foreach_abs_(current)
        torch._foreach_mul_(uncertainty, beta2)
        torch._foreach_add_(uncertainty, current, alpha=1 - beta2)


def entry_scores(sensitivity: Tensor, uncertainty: Tensor, kind: Importance) -> Tensor:
    """s(w) of each entry: Ī·Ū (equation 13), or Ī alone, which is what the authors' selector calls s = I."""
    return sensitivity * uncertainty if kind == "sensitivity*uncertainty" else sensitivity


def triplet_scores(A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    """S of equation 9, shape (r,): s(λ) plus the means of s over the row of A and the column of B.

    A (r, in), E (r, 1), B (out, r) hold the entry scores.
    """
    return E.view(-1) + (A.mean(dim=1) + B.mean(dim=0))


def magnitude_scores(E: Tensor) -> Tensor:
    """|λ| of lora_E (r, 1), shape (r,): the paper's baseline without gradients."""
    return E.detach().abs().view(-1)
