"""Which learning rate counts, and which runs are still to be done: functions of what results.jsonl holds.

The rate of a cell is the one with the best mean validation score over the seeds. Test scores are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# rate → seed → validation score; None where the run failed.
Scores = Mapping[float, Mapping[int, float | None]]


@dataclass(frozen=True)
class Choice:
    """A cell's learning rate as far as it is known.

    `wanted` are all rates to run; `settled` says that they have run with all seeds and that no more follow. `rate`
    is None as long as no seed is through with all rates of the first grid, or if every rate had a run that failed.
    `edge` is "low" or "high" where the best rate is at an end of `wanted`.
    """

    rate: float | None
    means: dict[float, float]
    wanted: tuple[float, ...]
    settled: bool
    edge: str | None


def choose(grid: Sequence[float], scores: Scores, seeds: Sequence[int], max_extensions: int) -> Choice:
    """Choose among `grid` and, as long as the best is at an edge, up to `max_extensions` steps on that side."""
    wanted, low, high = sorted(grid), 0, 0
    while True:
        done = [rate for rate in wanted if all(seed in scores.get(rate, {}) for seed in seeds)]
        if len(done) < len(wanted):
            return _unsettled(wanted, sorted(grid), done, scores, seeds)
        means = _means(wanted, scores, seeds)
        best = _best(means)
        if best is None:
            return Choice(None, means, tuple(wanted), True, None)
        if best == wanted[-1] and high < max_extensions and len(grid) > 1:
            high += 1
            wanted.append(extension(grid, high))
        elif best == wanted[0] and low < max_extensions and len(grid) > 1:
            low += 1
            wanted.insert(0, extension(grid, -low))
        else:
            return Choice(best, means, tuple(wanted), True, _edge(best, wanted))


def extension(grid: Sequence[float], steps: int) -> float:
    """The rate `steps` beyond the upper end of a grid, or, if negative, below its lower one, by its mean ratio.

    Rounded to one digit if the ratio is above 2, else to two, as such grids are written: 1e-3, 3e-3, 1e-2 goes on
    with 3e-2 and 1e-1.
    """
    ordered = sorted(grid)
    ratio = (ordered[-1] / ordered[0]) ** (1 / (len(ordered) - 1))
    rate = (ordered[-1] if steps > 0 else ordered[0]) * ratio**steps
    return float(f"{rate:.{0 if ratio > 2 else 1}e}")


def _unsettled(
    wanted: list[float], grid: list[float], done: list[float], scores: Scores, seeds: Sequence[int]
) -> Choice:
    """What can be said meanwhile: the best of the rates that are through, or by the seeds that all have."""
    if all(rate in done for rate in grid):
        means = _means(done, scores, seeds)
    else:
        common = [seed for seed in seeds if all(seed in scores.get(rate, {}) for rate in grid)]
        means = _means(grid, scores, common) if common else {}
    return Choice(_best(means), means, tuple(wanted), False, None)


def _means(rates: Sequence[float], scores: Scores, seeds: Sequence[int]) -> dict[float, float]:
    """Mean score of each rate; −∞ if one of its runs failed."""
    values = {rate: [scores[rate][seed] for seed in seeds] for rate in rates}
    return {
        rate: -math.inf if None in found else math.fsum(v for v in found if v is not None) / len(found)
        for rate, found in values.items()
    }


def _best(means: Mapping[float, float]) -> float | None:
    """The rate with the highest mean, of equal ones the lowest."""
    best = max(sorted(means), key=lambda rate: means[rate], default=None)
    return None if best is None or means[best] == -math.inf else best


def _edge(best: float, wanted: Sequence[float]) -> str | None:
    if len(wanted) == 1:
        return None
    return "low" if best == wanted[0] else "high" if best == wanted[-1] else None
