"""What paired scores say: intervals, tests, equivalence. Pure functions of numbers.

A difference is an arm's score less the reference's at the same task, budget and seed, in points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import binomtest, spearmanr
from scipy.stats import t as student

RESAMPLES = 10_000
LEVEL = 0.95
MARGIN = 0.5  # points within which two arms count as equivalent


def bootstrap_interval(
    differences: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of the mean over tasks of the mean over seeds; differences[task] are those of its seeds.

    Tasks are drawn with replacement, then seeds within each task drawn. With five tasks or fewer it is too narrow:
    so few cannot show how much tasks differ.
    """
    generator = np.random.default_rng(seed)
    # drawn[i, t] is the mean of a resample of task t's seeds; a task drawn twice needs two such means.
    tasks, counts = len(differences), [len(values) for values in differences]
    chosen = generator.integers(tasks, size=(resamples, tasks))
    means = np.empty((resamples, tasks))
    for task, values in enumerate(differences):
        rows = generator.integers(counts[task], size=(resamples, tasks, counts[task]))
        drawn = np.asarray(values, dtype=float)[rows].mean(-1)  # (resamples, tasks)
        means = np.where(chosen == task, drawn, means)
    tail = (1 - level) / 2
    low, high = np.quantile(means.mean(1), [tail, 1 - tail])
    return float(low), float(high)


def mean_of_means(differences: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the mean over seeds: tasks weigh the same."""
    return math.fsum(mean(values) for values in differences) / len(differences)


def paired_t(values: Sequence[float]) -> float | None:
    """Two-sided p of "the mean difference is 0"; None for fewer than two values."""
    if len(values) < 2:
        return None
    error = standard_error(values)
    if error == 0:
        return 0.0 if mean(values) else 1.0
    return float(2 * student.sf(abs(mean(values)) / error, len(values) - 1))


def tost(values: Sequence[float], margin: float = MARGIN) -> float | None:
    """p of the two one-sided tests of "the mean lies outside ± margin" (Schuirmann 1987); None below two values."""
    if len(values) < 2:
        return None
    error, inside = standard_error(values), margin - abs(mean(values))
    if error == 0:
        return 0.0 if inside > 0 else 1.0
    return float(student.sf(inside / error, len(values) - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values of a family of tests (Holm 1979): the k-th least times the number not below it."""
    adjusted, running = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def sign_test(values: Sequence[float]) -> float | None:
    """Two-sided p of "above 0 as often as below", without the zeros; None without any other."""
    above, below = sum(value > 0 for value in values), sum(value < 0 for value in values)
    return float(binomtest(above, above + below).pvalue) if above + below else None


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None for fewer than two values."""
    if len(values) < 2:
        return None
    center = mean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; for at least two values."""
    return (deviation(values) or 0.0) / math.sqrt(len(values))


def smallest_sufficient(scores: Mapping[float, Sequence[float]]) -> float | None:
    """The smallest budget whose mean score is within one standard error of the best one's; scores are by budget.

    The rule by which Breiman et al. (1984) choose a size: the error is that of the best mean. None for a budget with
    fewer than two scores, as that leaves the error, or the best, open.
    """
    if not scores or any(len(values) < 2 for values in scores.values()):
        return None
    best = max(sorted(scores), key=lambda budget: mean(scores[budget]))
    least = mean(scores[best]) - standard_error(scores[best])
    return min(budget for budget, values in scores.items() if mean(values) >= least)


def half_width(values: Sequence[float], level: float = LEVEL) -> float | None:
    """Half of the t interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(student.ppf((1 + level) / 2, len(values) - 1)) * standard_error(values)


def overlap(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Jaccard index of two rank maps as sets of (matrix, place): Σ min / Σ max.

    Which triplet of a matrix was kept means nothing between seeds, since triplets begin at random: only how many.
    """
    names = first.keys() | second.keys()
    pairs = [(first.get(name, 0), second.get(name, 0)) for name in names]
    most = sum(max(pair) for pair in pairs)
    return sum(min(pair) for pair in pairs) / most if most else 1.0


def rank_correlation(first: Mapping[str, int], second: Mapping[str, int]) -> float | None:
    """Spearman's correlation of two rank maps; None if one is constant."""
    names = sorted(first.keys() | second.keys())
    values = [[ranks.get(name, 0) for name in names] for ranks in (first, second)]
    if any(len(set(column)) < 2 for column in values):
        return None
    return float(spearmanr(*values).statistic)


def chance_overlap(first: Mapping[str, int], second: Mapping[str, int], seed: int = 0, times: int = 200) -> float:
    """Mean overlap if the ranks of the second map were dealt out anew among all matrices."""
    generator, names = np.random.default_rng(seed), sorted(first.keys() | second.keys())
    ranks = [second.get(name, 0) for name in names]
    deals = (dict(zip(names, generator.permutation(ranks).tolist(), strict=True)) for _ in range(times))
    return mean([overlap(first, deal) for deal in deals])
