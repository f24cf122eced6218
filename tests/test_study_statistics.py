"""The statistics of a study against other ways to compute them, simulation, and tables of the t distribution."""

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from adalora.study import statistics
from adalora.study.summary import verdict


def test_the_interval_is_that_of_drawing_tasks_and_seeds_one_by_one() -> None:
    differences = [[0.1, 1.3], [2.0, 2.4, -0.3], [-0.5, 0.2]]
    generator, means = np.random.default_rng(1), []
    for _ in range(5_000):
        drawn = [differences[task] for task in generator.integers(3, size=3)]
        means.append(np.mean([generator.choice(values, len(values)).mean() for values in drawn]))
    assert statistics.bootstrap_interval(differences) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.06)


def test_the_interval_of_one_task_with_two_seeds_is_its_range() -> None:
    """Each end is drawn a quarter of the time."""
    assert statistics.bootstrap_interval([[1.0, 3.0]]) == (1.0, 3.0)


def test_the_interval_is_the_same_each_time() -> None:
    differences = [[0.3, 0.1], [0.2, 0.9]]
    assert statistics.bootstrap_interval(differences) == statistics.bootstrap_interval(differences)
    assert statistics.bootstrap_interval(differences, seed=1, resamples=50) != statistics.bootstrap_interval(
        differences, resamples=50
    )


def simulated_coverage(tasks: int, seeds: int, studies: int = 200) -> float:
    """How often the interval holds the true mean 0.7, with tasks that differ by 1 point and seeds by 0.8."""
    generator, held = np.random.default_rng(0), 0
    for number in range(studies):
        means = generator.normal(0.7, 1.0, size=(tasks, 1))
        values = generator.normal(means, 0.8, size=(tasks, seeds)).tolist()
        low, high = statistics.bootstrap_interval(values, seed=number, resamples=400)
        held += low <= 0.7 <= high
    return held / studies


@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says_with_many_tasks_and_less_often_with_five() -> None:
    assert 0.90 <= simulated_coverage(tasks=12, seeds=4) <= 0.99
    assert 0.80 <= simulated_coverage(tasks=5, seeds=3) <= 0.95


def test_tasks_weigh_the_same_whatever_their_number_of_seeds() -> None:
    assert statistics.mean_of_means([[1.0], [2.0, 4.0, 6.0]]) == 2.5


def test_the_paired_test_is_scipys() -> None:
    values = [0.3, 1.2, -0.4, 0.9, 0.8]
    assert statistics.paired_t(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-12)
    assert statistics.paired_t([1.0]) is None
    assert statistics.paired_t([0.0, 0.0]) == 1.0 and statistics.paired_t([2.0, 2.0]) == 0.0


def test_holm_by_hand() -> None:
    """Holm 1979: .01 × 4, .02 × 3, .03 × 2 falls back to .06, .9 × 1."""
    adjusted = statistics.holm({"a": 0.03, "b": 0.01, "c": 0.9, "d": 0.02})
    assert adjusted == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.9, "d": 0.06})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert statistics.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert statistics.holm({}) == {}


@pytest.mark.parametrize("p_values", list(itertools.permutations([0.004, 0.02, 0.04])))
def test_holm_rejects_as_the_step_down_procedure_does(p_values: tuple[float, ...]) -> None:
    adjusted, rejected = statistics.holm({str(i): p for i, p in enumerate(p_values)}), set()
    for place, p in enumerate(sorted(p_values)):
        if p > 0.05 / (len(p_values) - place):
            break
        rejected.add(p)
    assert {p for i, p in enumerate(p_values) if adjusted[str(i)] <= 0.05} == rejected


def test_equivalence_begins_where_the_t_quantile_says() -> None:
    """With 3 seeds and p = .05, a mean of 0 must stand 2.920 standard errors from either margin."""
    values, quantile = np.array([-1.0, 0.0, 1.0]), 2.9199856
    for error, equivalent in ((0.5 / quantile * 0.999, True), (0.5 / quantile * 1.001, False)):
        p = statistics.tost((values * error * np.sqrt(3)).tolist())
        assert p is not None and (p < 0.05) == equivalent and p == pytest.approx(0.05, abs=2e-4)


def test_equivalence_is_two_one_sided_tests_of_scipy() -> None:
    values = [0.1, 0.35, -0.2, 0.3]
    above = stats.ttest_1samp(values, -0.5, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.5, alternative="less").pvalue
    assert statistics.tost(values) == pytest.approx(max(above, below), rel=1e-12)
    outside = statistics.tost([0.9, 1.1, 1.0])
    assert outside is not None and outside > 0.9
    assert statistics.tost([0.0, 0.0]) == 0.0 and statistics.tost([0.7, 0.7]) == 1.0 and statistics.tost([0.1]) is None


def test_the_sign_test_counts_cells_without_ties() -> None:
    assert statistics.sign_test([1, 2, 3, 4, 5, 0]) == pytest.approx(2 / 2**5)
    assert statistics.sign_test([0, 0]) is None


def test_half_widths_are_those_of_the_t_interval() -> None:
    values = [90.0, 91.0, 93.0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert statistics.half_width(values) == pytest.approx((high - low) / 2)
    assert statistics.half_width([1.0]) is None and statistics.deviation([1.0]) is None


@pytest.mark.parametrize(
    "interval,tost,words",
    [
        ((0.1, 0.9), 0.4, "better"),
        ((-0.9, -0.1), None, "worse"),
        ((-0.2, 0.3), 0.01, "equivalent (± 0.5)"),
        ((0.1, 0.3), 0.01, "better, equivalent (± 0.5)"),
        ((-0.2, 0.9), 0.2, "open"),
    ],
)
def test_a_verdict_is_what_the_interval_and_the_tests_allow(interval: Any, tost: float | None, words: str) -> None:
    assert verdict(*interval, tost) == words


def test_overlap_of_rank_maps_is_the_jaccard_index_of_their_places() -> None:
    first, second = {"q": 2, "k": 0, "v": 1}, {"q": 1, "k": 1, "v": 1}
    sets = [{(name, place) for name, rank in ranks.items() for place in range(rank)} for ranks in (first, second)]
    assert statistics.overlap(first, second) == len(sets[0] & sets[1]) / len(sets[0] | sets[1]) == 0.5
    assert statistics.overlap(first, first) == statistics.overlap({}, {}) == 1.0


def test_agreement_beyond_chance_shows() -> None:
    first = {f"m{i}": rank for i, rank in enumerate([4, 4, 3, 0, 0, 1, 0, 0, 2, 0])}
    assert statistics.chance_overlap(first, first) < 0.6 < statistics.overlap(first, first)
    assert statistics.rank_correlation(first, first) == pytest.approx(1)
    assert statistics.rank_correlation(first, dict.fromkeys(first, 1)) is None
