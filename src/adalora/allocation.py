"""Which triplets live: exactly `budget` of them, the highest-scoring over all matrices (equation 6).

The authors compare with the k-th smallest score, which prunes too many where scores tie, keeps NaN, and
fails for k = 0. Here a stable order decides: of equal scores the earlier matrix and index lives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_top(scores: Sequence[Tensor], budget: int, minimum: Sequence[int] | None = None) -> list[Tensor]:
    """For scores (r_k,) of each matrix k, bool tensors (r_k,) with exactly `budget` true entries in all.

    Each matrix first keeps its own `minimum[k]` best. The caller sees to it that the minima fit into the
    budget, the budget into the triplets, and that scores are finite.
    """
    joined = torch.cat([score.to(scores[0].device) for score in scores])  # a model may live on several
    granted = torch.zeros_like(joined, dtype=torch.bool)
    if minimum is not None and any(minimum):
        granted = torch.cat([_top(score, k).to(joined.device) for score, k in zip(scores, minimum, strict=True)])
        budget -= int(sum(minimum))
    # Those already granted leave the contest, which is decided by rank alone and so needs no score range.
    order = torch.argsort(joined, descending=True, stable=True)
    contest = order[~granted[order]]
    granted[contest[:budget]] = True
    return list(torch.split(granted, [score.numel() for score in scores]))


def _top(score: Tensor, count: int) -> Tensor:
    keep = torch.zeros_like(score, dtype=torch.bool)
    keep[torch.argsort(score, descending=True, stable=True)[:count]] = True
    return keep
