"""Exact re-factorisation: ΔW = PΛQ written anew as its own singular value decomposition, optimizer state included.

With thin QR P = Q_p R_p, Qᵀ = Q_q R_q and the small SVD R_p Λ R_qᵀ = U Σ Vᵀ:

    P ← Q_p U        Λ ← Σ        Q ← Vᵀ Q_qᵀ

The function of the model stays, P and Q are orthonormal to rounding with no penalty, λ ≥ 0 are the singular values,
and triplets that said the same collapse into one. Only live triplets take part. A pruned one keeps its place with
λ = 0, and for directions what its old ones have outside the span of all before it: it adds nothing now, repeats
nobody when it comes back, and leaves P and Q orthonormal as a whole.

Where a matrix has more triplets than min(out, in), λ is 0 for those too many; they keep the directions that they
had, at length one, since no orthonormal ones are left.

What gradients did in the old basis they do in the new one as follows (with λ = 0 both sides are 0):

    ∂P' = ∂P · R_pᵀU        ∂Q' = VᵀR_q · ∂Q        ∂λ' = diag(UᵀR_p⁻ᵀ N R_q⁻¹V),        N = Pᵀ G Qᵀ

The diagonal of N is ∂λ; off it N_ij λ_j = (Pᵀ∂P)_ij and N_ij λ_i = (∂Q Qᵀ)_ij. So momentum moves exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TrainingError

_TIE = 1e-14  # what orders singular values that are exactly equal, relative to the largest
_DEPENDENT = 0.01  # sine of the angle below which a direction says nothing that the others do not
_SMALL = 1e-3  # λ below this part of the largest is too noisy to divide by


class Turn(NamedTuple):
    """One stack of g modules before and after, all with triplets as columns, and how gradients move between.

    P (g, out, r), Q (g, in, r), E (g, r) are the old factors, the `new_` ones the new; keep (g, r) as in the modules.
    left, right (g, r, r): ∂P' = ∂P · left, ∂Qᵀ' = ∂Qᵀ · right. inner_left, inner_right (g, r, r): P' = P · inner_left
    and so for Q on the span of P and Q; both 0 where P or Q is rank deficient.
    """

    P: Tensor
    E: Tensor
    Q: Tensor
    keep: Tensor
    new_P: Tensor
    new_E: Tensor
    new_Q: Tensor
    left: Tensor
    right: Tensor
    inner_left: Tensor
    inner_right: Tensor


def thin_qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Q (…, n, k), R (…, k, r), k = min(n, r), of columns (…, n, r); orthonormal columns stay as they are."""
    Q, R = torch.linalg.qr(columns)
    side = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return Q * side.unsqueeze(-2), R * side.unsqueeze(-1)


def turn(A: Tensor, E: Tensor, B: Tensor, keep: Tensor) -> Turn:
    """The new factors of stacks A (g, r, in), E (g, r, 1), B (g, out, r), bool keep (g, r); best in fp64.

    Each new triplet stands where a live old one stood, the largest σ at the largest |λ|, with p turned to the side of
    the old p; pruned ones keep their places.
    """
    rank, count = keep.shape[1], min(A.shape[1:] + B.shape[1:2])
    E = torch.where(keep, E.squeeze(2), 0.0)  # (g, r)
    order = torch.where(keep, E.abs(), -1.0).argsort(dim=1, descending=True, stable=True)
    place = F.one_hot(order, rank).to(B.dtype)  # (g, r, r): row i marks the triplet that stands i-th
    P, Q = B @ place.mT, A.mT @ place.mT
    (left, Rp), (right, Rq) = thin_qr(P), thin_qr(Q)
    core = (Rp * E.gather(1, order).unsqueeze(1)) @ Rq.mT  # (g, ≤ r, ≤ r)
    U, V = _singular_vectors(core, keep.sum(1))  # (g, ·, count)
    side = (Rp[..., :count] * U).sum(1) + 0.5 * (Rq[..., :count] * V).sum(1)  # p decides, q where p does not
    side = torch.where(side < 0, -1.0, 1.0).unsqueeze(1)
    U, V = U * side, V * side
    values = F.pad((U * (core @ V)).sum(1).clamp_min(0.0), (0, rank - count))
    new_P = torch.cat([left @ U, F.normalize(P[..., count:], dim=1)], 2) @ place
    new_Q = torch.cat([right @ V, F.normalize(Q[..., count:], dim=1)], 2) @ place
    new_E = torch.where(keep, (values.unsqueeze(1) @ place).squeeze(1), 0.0)
    grads = [place.mT @ F.pad(R.mT @ W, (0, rank - count)) @ place for R, W in ((Rp, U), (Rq, V))]
    inner = [place.mT @ part @ place for part in _inner(Rp, U, Rq, V)]
    return Turn(B, E, A.mT, keep, new_P, new_E, new_Q, *grads, *inner)


def moved_first(old: tuple[Tensor, Tensor, Tensor], turned: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """Averages of the gradients of A (g, r, in), E (g, r, 1), B (g, out, r), as they would be of the new factors."""
    live = turned.keep.unsqueeze(1)
    # The gradient of a pruned triplet's p and q is zero; what an average still holds is from before.
    Q, P = torch.where(live, old[0].mT, 0.0), torch.where(live, old[2], 0.0)
    rows, columns = turned.E.unsqueeze(2), turned.E.unsqueeze(1)
    size = rows.square() + columns.square()
    least = (_SMALL * turned.E.abs().amax(1)).square().view(-1, 1, 1)
    outer = turned.P.mT @ P * columns + Q.mT @ turned.Q * rows
    core = torch.where(size > 0, outer / (size + least), 0.0)  # N off the diagonal; unknown where both λ are 0
    core.diagonal(dim1=1, dim2=2).copy_(old[1].squeeze(2))
    values = (turned.inner_left * (core @ turned.inner_right)).sum(1)
    return (Q @ turned.right).mT, values.unsqueeze(2), P @ turned.left


def square_factors(turned: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """What squares of gradients of A, E, B are to be multiplied by, (g, r, 1), (g, r, 1), (g, 1, r).

    Exact for bringing p and q to length one. That they turn as well is left out: they turn little from one time to
    the next, each triplet's place has the same rank among the others as before, and mixing squares over triplets,
    which would be right for columns that do not correlate, evens out what Adam had learned of each.
    """
    p, q = (torch.linalg.vector_norm(part, dim=1) for part in (turned.P, turned.Q))  # (g, r)
    p, q = (torch.where(part > 0, part, 1.0).square() for part in (p, q))
    return q.unsqueeze(2), (1 / (p * q)).unsqueeze(2), p.unsqueeze(1)


def _singular_vectors(core: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """U (g, a, c), V (g, b, c) of core (g, a, b), c = min(a, b), with values falling; unit vectors from the live-th on.

    The core is zero there. It is given values above all others, so that the SVD keeps both parts apart and the first
    ones are known to be those; and a slope where it is zero, so that equal values keep their order.
    """
    count = min(core.shape[1:])
    position = torch.arange(count, device=core.device)
    alive = position < live.unsqueeze(1)  # (g, c)
    norm = torch.linalg.matrix_norm(core).view(-1, 1, 1)
    nudged = core / torch.where(norm > 0, norm, 1.0)
    slope = _TIE * (1 - position / (2 * count)).to(core.dtype)
    nudged.diagonal(dim1=1, dim2=2).add_(torch.where(alive, slope, 2.0))
    try:
        U, _, Vh = torch.linalg.svd(nudged, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise TrainingError(
            "an increment has no singular value decomposition, because its factors are not finite: the run has "
            "diverged. Lower the learning rate, or clip gradients."
        ) from error
    source = (position + (count - live.unsqueeze(1)).clamp_min(0)) % count  # past the pruned ones
    parts = []
    for part in (U, Vh.mT):
        own = part.gather(2, source.unsqueeze(1).expand_as(part))
        unit = torch.eye(*part.shape[1:], dtype=part.dtype, device=part.device)
        parts.append(torch.where(alive.unsqueeze(1), own, unit))
    return parts[0], parts[1]


def _inner(Rp: Tensor, U: Tensor, Rq: Tensor, V: Tensor) -> list[Tensor]:
    """R_p⁻¹U and R_q⁻¹V (g, r, r); zero where either has no good inverse."""
    (_, a, rank), b = Rp.shape, Rq.shape[1]
    if min(a, b) < rank:
        return [Rp.new_zeros(len(Rp), rank, rank)] * 2
    sines = [R.diagonal(dim1=1, dim2=2) / torch.linalg.vector_norm(R, dim=1) for R in (Rp, Rq)]  # NaN for a zero column
    good = torch.stack([(sine > _DEPENDENT).all(1) for sine in sines]).all(0).view(-1, 1, 1)
    return [torch.where(good, torch.linalg.solve_triangular(R, W, upper=True), 0.0) for R, W in ((Rp, U), (Rq, V))]
