"""Which triplets live: exactly `budget` of them, the highest-scoring over all matrices (equation 6).

With costs, the first that fit when they are ranked by score for the cost (greedy knapsack): never more than the
budget is spent, and less than what is left over would buy.

The authors compare with the k-th smallest score, which prunes too many where scores tie, keeps NaN, and
fails for k = 0. Here a stable order decides: of equal scores the earlier matrix and index lives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_top(
    scores: Sequence[Tensor],
    budget: int,
    minimum: Sequence[int] | None = None,
    costs: Sequence[int] | None = None,
    exponent: float = 0.0,
) -> list[Tensor]:
    """For scores (r_k,) of each matrix k, bool tensors (r_k,) with exactly `budget` true entries in all.

    With `costs`, of one triplet of each matrix, the true ones cost `budget` at most, and none that is false would
    still fit; they are ranked by score / cost^exponent. Each matrix first keeps its own `minimum[k]` best. The caller
    sees to it that the minima fit into the budget, the budget into the triplets, and that scores are finite. Nothing
    here waits for a device.
    """
    joined = torch.cat([score.to(scores[0].device) for score in scores])  # a model may live on several
    sizes, alike = [score.numel() for score in scores], costs is None or len(set(costs)) == 1
    prices = None
    if not alike:
        spread = torch.tensor(costs).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes))
        prices = spread.to(joined.device)
    if prices is not None and exponent:
        joined = joined / prices**exponent
    order = torch.argsort(joined, descending=True, stable=True)
    if minimum is not None and any(minimum):
        granted = torch.cat([_top(score, k).to(joined.device) for score, k in zip(scores, minimum, strict=True)])
        # The granted come first, then the others by rank: no score range is needed to put them there.
        first = torch.argsort(granted.gather(0, order), descending=True, stable=True)
        order = order.gather(0, first)
    keep = torch.zeros_like(joined, dtype=torch.bool)
    if prices is None:
        keep.scatter_(0, order.narrow(0, 0, budget // (costs[0] if costs else 1)), True)
    else:
        keep.scatter_(0, order, _affordable(prices.gather(0, order), budget, len(set(costs or ()))))
    return list(torch.split(keep, sizes))


def _affordable(prices: Tensor, budget: int, classes: int) -> Tensor:
    """Whether each of `prices` (n,) of so many different values is paid when they are taken in turn, if they fit.

    One pass pays up to the first that does not fit. No other of its price will ever fit, so that after as many
    passes as there are prices nothing is left to decide.
    """
    bought, left = torch.zeros_like(prices, dtype=torch.bool), torch.full_like(prices[0], budget)
    for _ in range(classes):
        fits = ~bought & (prices <= left)
        paid = torch.where(fits, prices, 0).cumsum(0)
        bought = bought | (fits & (paid <= left))
        left = budget - torch.where(bought, prices, 0).sum()
    return bought


def _top(score: Tensor, count: int) -> Tensor:
    order = torch.argsort(score, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(0, order.narrow(0, 0, count), True)
