"""Ranks as pure functions of a budget, of costs, of other ranks.

The cost of a matrix is what one rank on it takes: in + out, and one more for a triplet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch


def spread(costs: Mapping[str, int], goal: int) -> dict[str, int]:
    """Ranks with Σ rank · cost ≤ goal: the largest uniform one, which may be 0, and one more here and there.

    What is left over goes to single matrices, spread over the depth.
    """
    rank, left = divmod(goal, sum(costs.values()))
    ranks = dict.fromkeys(costs, rank)
    # Every seventh module in turn: one that is coprime to the usual six kinds visits all depths and kinds.
    names = list(costs)
    for name in sorted(names, key=lambda name: names.index(name) * 7 % len(names)):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def permuted(ranks: Mapping[str, int], costs: Mapping[str, int], seed: int) -> dict[str, int]:
    """The same ranks dealt out anew among matrices of equal cost; another pattern than before if there is one."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name in ranks:
        groups[costs[name]].append(name)
    generator = torch.Generator().manual_seed(seed)
    dealt = dict(ranks)
    while any(len({ranks[name] for name in group}) > 1 for group in groups.values()):
        for group in groups.values():
            order = torch.randperm(len(group), generator=generator).tolist()
            dealt |= {name: ranks[group[index]] for name, index in zip(group, order, strict=True)}
        if dealt != ranks:
            break
    return dealt
