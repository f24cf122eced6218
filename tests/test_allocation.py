"""The exact top-b choice against the twin's, and against what the authors' threshold does instead."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from adalora.allocation import keep_top

# Few distinct values, so that ties are the rule and not the exception.
score = st.sampled_from([0.0, 1e-30, 0.5, 1.0, 1.0 + 1e-9, 2.0, 1e30])
lists = st.lists(st.lists(score, min_size=0, max_size=5), min_size=1, max_size=5)


def tensors(scores: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(values, dtype=torch.float64) for values in scores]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], int, list[int]]:
    scores = draw(lists.filter(lambda s: any(s)))
    minimum = [draw(st.integers(0, len(values))) for values in scores]
    return scores, draw(st.integers(sum(minimum), sum(map(len, scores)))), minimum


@settings(max_examples=300, deadline=None)
@given(problems())
def test_choice_equals_the_twin_with_ties_and_minima(problem: tuple[list[list[float]], int, list[int]]) -> None:
    scores, budget, minimum = problem
    chosen = [keep.tolist() for keep in keep_top(tensors(scores), budget, minimum)]
    assert chosen == reference.keep_top(scores, budget, minimum)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_exactly_the_budget_is_kept_and_no_sum_is_higher(problem: tuple[list[list[float]], int, list[int]]) -> None:
    scores, budget, minimum = problem
    keeps = keep_top(tensors(scores), budget, minimum)
    assert sum(int(keep.sum()) for keep in keeps) == budget
    assert all(int(keep.sum()) >= least for keep, least in zip(keeps, minimum, strict=True))
    chosen = sorted(
        (s for values, keep in zip(scores, keeps, strict=True) for s, k in zip(values, keep, strict=True) if k)
    )
    assert chosen == sorted(best_by_trying(scores, budget, minimum))


def best_by_trying(scores: list[list[float]], budget: int, minimum: list[int]) -> list[float]:
    """Each module's `minimum` best, then the best of the rest."""
    ordered = [sorted(values, reverse=True) for values in scores]
    granted = [value for values, least in zip(ordered, minimum, strict=True) for value in values[:least]]
    rest = sorted((v for values, least in zip(ordered, minimum, strict=True) for v in values[least:]), reverse=True)
    return granted + rest[: budget - len(granted)]


@pytest.mark.parametrize("budget", range(7))
def test_every_budget_from_none_to_all_is_met(budget: int) -> None:
    scores = [[3.0, 1.0, 3.0], [3.0, 0.0, 2.0]]
    keeps = [keep.tolist() for keep in keep_top(tensors(scores), budget)]
    assert sum(map(sum, keeps)) == budget
    assert keeps == reference.keep_top(scores, budget)
    subsets = itertools.combinations([s for values in scores for s in values], budget)
    kept = sum(s for values, keep in zip(scores, keeps, strict=True) for s, k in zip(values, keep, strict=True) if k)
    assert kept == max(map(sum, subsets))


def test_ties_keep_the_earlier_triplet_where_the_authors_lose_it() -> None:
    """V3 and peers C2: with three equal scores at the threshold theirs keeps 5 of 6, and of all-equal ones none."""
    scores = [[1.0, 1.0, 1.0, 2.0], [3.0, 4.0, 5.0, 6.0]]
    assert sum(map(sum, reference.authors_mask(scores, 6))) == 5
    assert [k.tolist() for k in keep_top(tensors(scores), 6)] == [[True, False, False, True], [True] * 4]
    equal = [[1.0] * 4, [1.0] * 4]
    assert sum(map(sum, reference.authors_mask(equal, 5))) == 0
    assert [k.tolist() for k in keep_top(tensors(equal), 5)] == [[True] * 4, [True] + [False] * 3]


def test_a_full_budget_prunes_nothing_where_the_authors_raise() -> None:
    """Peers B1: k = 0."""
    scores = [[1.0, 2.0], [0.0, 3.0]]
    with pytest.raises(RuntimeError, match="out of range"):
        reference.authors_mask(scores, 4)
    assert [k.tolist() for k in keep_top(tensors(scores), 4)] == [[True, True], [True, True]]


def test_a_minimum_protects_a_weak_matrix_and_no_more() -> None:
    scores = [[0.3, 0.1, 0.2], [9.0, 8.0, 7.0]]
    assert [k.tolist() for k in keep_top(tensors(scores), 3)] == [[False] * 3, [True] * 3]
    assert [k.tolist() for k in keep_top(tensors(scores), 3, [2, 0])] == [[True, False, True], [True, False, False]]
    assert [k.tolist() for k in keep_top(tensors(scores), 2, [1, 1])] == [[True, False, False], [True, False, False]]


def test_matrices_of_different_capacity_compete_as_equals() -> None:
    scores = tensors([[5.0], [], [4.0, 6.0, 1.0]])
    assert [k.tolist() for k in keep_top(scores, 2)] == [[True], [], [False, True, False]]


# --- With costs ---------------------------------------------------------------------------------------------


def bought_in_turn(
    scores: list[list[float]], costs: list[int], budget: int, minimum: list[int], exponent: float
) -> Any:
    """The greedy knapsack, one triplet after the other."""
    keeps = [[False] * len(values) for values in scores]
    worth = {(k, i): v / costs[k] ** exponent for k, values in enumerate(scores) for i, v in enumerate(values)}
    granted = [
        (k, i)
        for k, values in enumerate(scores)
        for i in sorted(range(len(values)), key=lambda i: -values[i])[: minimum[k]]
    ]
    ranked = sorted(worth, key=lambda place: -worth[place])
    for k, i in [p for p in ranked if p in granted] + [p for p in ranked if p not in granted]:
        if costs[k] <= budget:
            keeps[k][i], budget = True, budget - costs[k]
    return keeps, budget


@st.composite
def priced(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int, list[int]]:
    scores = draw(lists.filter(lambda s: any(s)))
    costs = [draw(st.integers(1, 9)) for _ in scores]
    minimum = [draw(st.integers(0, len(values))) for values in scores]
    least = sum(c * m for c, m in zip(costs, minimum, strict=True))
    return scores, costs, draw(st.integers(least, sum(c * len(v) for c, v in zip(costs, scores, strict=True)))), minimum


@settings(max_examples=300, deadline=None)
@given(priced(), st.sampled_from([0.0, 0.5, 1.0]))
def test_with_costs_the_choice_is_the_greedy_one_and_never_above_the_budget(problem: Any, exponent: float) -> None:
    scores, costs, budget, minimum = problem
    keeps = keep_top(tensors(scores), budget, minimum, costs, exponent)
    expected, left = bought_in_turn(scores, costs, budget, minimum, exponent)
    assert [keep.tolist() for keep in keeps] == expected
    spent = sum(c * int(keep.sum()) for c, keep in zip(costs, keeps, strict=True))
    assert spent == budget - left
    dropped = [c for c, keep in zip(costs, keeps, strict=True) if not keep.all()]
    assert all(c > left for c in dropped)


def test_density_prefers_what_is_cheap_for_its_score() -> None:
    """Scores 3 and 2 at prices 9 and 1, budget 9: by score the dear one, by density the cheap one."""
    dear, cheap = torch.tensor([3.0]), torch.tensor([2.0])
    assert [k.tolist() for k in keep_top([dear, cheap], 9, None, [9, 1], 0.0)] == [[True], [False]]
    assert [k.tolist() for k in keep_top([dear, cheap], 9, None, [9, 1], 0.5)] == [[False], [True]]


def test_equal_costs_give_the_choice_of_triplets() -> None:
    scores = [torch.rand(5), torch.rand(4)]
    for budget in range(10):
        same = keep_top(scores, 7 * budget + 3, None, [7, 7], 1.0)
        assert all(map(torch.equal, same, keep_top(scores, budget)))
