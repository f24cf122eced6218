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
    budget, the budget into the triplets, and that scores are finite. Nothing here waits for a device.
    """
    joined = torch.cat([score.to(scores[0].device) for score in scores])  # a model may live on several
    order = torch.argsort(joined, descending=True, stable=True)
    if minimum is not None and any(minimum):
        granted = torch.cat([_top(score, k).to(joined.device) for score, k in zip(scores, minimum, strict=True)])
        # The granted come first, then the others by rank: no score range is needed to put them there.
        first = torch.argsort(granted.gather(0, order), descending=True, stable=True)
        order = order.gather(0, first)
    keep = torch.zeros_like(joined, dtype=torch.bool).scatter_(0, order.narrow(0, 0, budget), True)
    return list(torch.split(keep, [score.numel() for score in scores]))


def _top(score: Tensor, count: int) -> Tensor:
    order = torch.argsort(score, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(0, order.narrow(0, 0, count), True)
