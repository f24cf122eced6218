"""A study's results → everything that tables and plots show, as plain values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from . import statistics
from .grid import Cell, Grid
from .ledger import Ledger
from .results import points

COLLAPSED = 10.0  # points under the reference's median

Numbers = dict[str, Any]


def summarize(ledger: Ledger) -> Numbers:
    """JSON-able. Scores and differences are in points."""
    grid = ledger.grid
    study = grid.study
    cells = [_cell(ledger, cell) for cell in grid.cells]
    done = sum(run.id in ledger.records for cell in grid.cells for run in ledger.wanted(cell))
    scores = _scores(ledger)
    arms = [arm for arm in study.arms if arm != study.reference]
    return {
        "study": grid.name,
        "reference": study.reference,
        "tasks": list(study.tasks),
        "arms": list(study.arms),
        "budgets": study.budgets,
        "seeds": study.seeds,
        "rate_seeds": study.choosing,
        "runs": {"done": done, "known": sum(len(ledger.wanted(cell)) for cell in grid.cells)},
        "cells": cells,
        "means": [_means(scores, grid, arm, budget) for budget in study.budgets for arm in study.arms],
        "differences": [_difference(scores, grid, arm, budget) for budget in study.budgets for arm in arms],
        "signs": [_signs(scores, grid, arm) for arm in arms],
        "sufficient": [_sufficient(ledger, scores, arm) for arm in study.arms if len(study.budgets) > 1],
        "agreement": [found for cell in grid.cells if (found := _agreement(ledger, cell))],
        "failed": _failed(ledger),
        "collapsed": _collapsed(ledger, scores),
    }


Scores = dict[Cell, dict[int, float]]


def _scores(ledger: Ledger) -> Scores:
    """Test scores at the chosen rate, in points, by seed."""
    found: Scores = {}
    for cell in ledger.grid.cells:
        by_seed = {seed: points(record, "test") for seed, record in ledger.chosen(cell).items()}
        found[cell] = {seed: value for seed, value in by_seed.items() if value is not None}
    return found


def _cell(ledger: Ledger, cell: Cell) -> Numbers:
    choice, records = ledger.choice(cell), list(ledger.chosen(cell).values())
    tests = [value for record in records if (value := points(record, "test")) is not None]
    return {
        "task": cell.task,
        "arm": cell.arm,
        "budget": cell.budget,
        "learning_rate": choice.rate,
        "validation": {f"{rate:g}": value for rate, value in choice.means.items() if value > float("-inf")},
        "tried": [f"{rate:g}" for rate in choice.wanted],
        "settled": choice.settled,
        "edge": choice.edge,
        "seeds": len(records),
        "asked": len(ledger.grid.study.seeds),
        "mean": statistics.mean(tests) if tests else None,
        "deviation": statistics.deviation(tests),
        "half_width": statistics.half_width(tests),
        "scores": tests,
        "parameters": _parameters([record["parameters"] for record in records]),
        "ranks": _mean_ranks([record["ranks"] for record in records if record["ranks"]]),
        "steps": records[0]["steps"] if records else None,
        "seconds": statistics.mean([record["seconds"] for record in records]) if records else None,
        "metric": records[0]["metric"] if records else None,
    }


def _parameters(counts: Sequence[dict[str, int]]) -> dict[str, float] | None:
    """Mean over seeds: with a budget in triplets the final count depends on which matrices they are in."""
    return {key: statistics.mean([count[key] for count in counts]) for key in counts[0]} if counts else None


def _mean_ranks(maps: Sequence[dict[str, int]]) -> dict[str, float] | None:
    """By matrix, over seeds; None for methods that have no ranks."""
    return {name: statistics.mean([found[name] for found in maps]) for name in maps[0]} if maps else None


def _means(scores: Scores, grid: Grid, arm: str, budget: float) -> Numbers:
    """Mean over the tasks; None unless all have one."""
    by_task = [list(scores[Cell(task, arm, budget)].values()) for task in grid.study.tasks]
    whole = statistics.mean_of_means(by_task) if all(by_task) else None
    return {"arm": arm, "budget": budget, "mean": whole}


def _paired(scores: Scores, grid: Grid, arm: str, budget: float) -> dict[str, dict[int, float]]:
    """Differences to the reference by task and seed, where both have run."""
    found = {}
    for task in grid.study.tasks:
        own, base = scores[Cell(task, arm, budget)], scores[Cell(task, grid.study.reference, budget)]
        if common := sorted(own.keys() & base.keys()):
            found[task] = {seed: own[seed] - base[seed] for seed in common}
    return found


def _difference(scores: Scores, grid: Grid, arm: str, budget: float) -> Numbers:
    paired = _paired(scores, grid, arm, budget)
    values: Numbers = {"arm": arm, "budget": budget, "mean": None, "interval": None, "tost": None, "verdict": ""}
    values["tasks"] = {task: _per_task(list(by_seed.values())) for task, by_seed in paired.items()}
    tested = {task: p for task, numbers in values["tasks"].items() if (p := numbers["p"]) is not None}
    for task, adjusted in statistics.holm(tested).items():
        values["tasks"][task]["p_holm"] = adjusted
    if not paired:
        return values
    by_task = [list(by_seed.values()) for by_seed in paired.values()]
    low, high = statistics.bootstrap_interval(by_task)
    # Tasks are taken as given here: each seed with all of them gives one mean.
    whole = set.intersection(*(set(by_seed) for by_seed in paired.values()))
    per_seed = [statistics.mean([by_seed[seed] for by_seed in paired.values()]) for seed in sorted(whole)]
    p = statistics.tost(per_seed)
    values |= {"mean": statistics.mean_of_means(by_task), "interval": [low, high], "tost": p}
    values["complete"] = len(paired) == len(grid.study.tasks)
    values["seeds"] = min(len(by_seed) for by_seed in paired.values())
    values["verdict"] = verdict(low, high, p) if values["seeds"] > 1 else "one seed: none"
    return values


def verdict(low: float, high: float, tost: float | None) -> str:
    """In words: better or worse if the interval excludes 0, equivalent by the two one-sided tests."""
    words = ["better"] if low > 0 else ["worse"] if high < 0 else []
    if tost is not None and tost < 1 - statistics.LEVEL:
        words.append(f"equivalent (± {statistics.MARGIN:g})")
    return ", ".join(words) or "open"


def _per_task(values: list[float]) -> Numbers:
    return {
        "mean": statistics.mean(values),
        "half_width": statistics.half_width(values),
        "seeds": len(values),
        "p": statistics.paired_t(values),
        "p_holm": None,
        "tost": statistics.tost(values),
    }


def _signs(scores: Scores, grid: Grid, arm: str) -> Numbers:
    """In how many cells (task × budget) the mean difference is above and below 0."""
    means = [
        statistics.mean(list(by_seed.values()))
        for budget in grid.study.budgets
        for by_seed in _paired(scores, grid, arm, budget).values()
    ]
    above, below = sum(value > 0 for value in means), sum(value < 0 for value in means)
    return {"arm": arm, "above": above, "below": below, "cells": len(means), "p": statistics.sign_test(means)}


def _sufficient(ledger: Ledger, scores: Scores, arm: str) -> Numbers:
    """The smallest budget that is as good as the best, by validation scores: a seed's mean over all tasks.

    The test scores of that budget are told, and play no part.
    """
    study, values = ledger.grid.study, {}
    for budget in study.budgets:
        found = [ledger.chosen(Cell(task, arm, budget)) for task in study.tasks]
        seeds = [seed for seed in study.seeds if all(seed in by_seed for by_seed in found)]
        values[budget] = [statistics.mean([points(own[seed], "validation") or 0.0 for own in found]) for seed in seeds]
    chosen = statistics.smallest_sufficient(values)
    return {
        "arm": arm,
        "budgets": [
            {
                "budget": budget,
                "mean": statistics.mean(own) if own else None,
                "error": statistics.standard_error(own) if len(own) > 1 else None,
                "seeds": len(own),
            }
            for budget, own in values.items()
        ],
        "budget": chosen,
        "test": None if chosen is None else _means(scores, ledger.grid, arm, chosen)["mean"],
    }


def _agreement(ledger: Ledger, cell: Cell) -> Numbers | None:
    """Of the rank maps of a cell's seeds, over all pairs of seeds."""
    maps = [record["ranks"] for record in ledger.chosen(cell).values() if record["ranks"]]
    pairs = list(itertools.combinations(maps, 2))
    if not pairs:
        return None
    correlations = [found for pair in pairs if (found := statistics.rank_correlation(*pair)) is not None]
    return {
        "task": cell.task,
        "arm": cell.arm,
        "budget": cell.budget,
        "seeds": len(maps),
        "overlap": statistics.mean([statistics.overlap(*pair) for pair in pairs]),
        "chance": statistics.mean([statistics.chance_overlap(*pair) for pair in pairs]),
        "correlation": statistics.mean(correlations) if correlations else None,
    }


def _failed(ledger: Ledger) -> list[Numbers]:
    records = (record for cell in ledger.grid.cells for record in ledger.of(cell))
    return [{"id": record["id"], "error": record["error"]} for record in records if record["status"] == "failed"]


def _collapsed(ledger: Ledger, scores: Scores) -> list[Numbers]:
    """Finished runs at chosen rates whose test score is far under the reference's median in the same cell."""
    found = []
    for cell in ledger.grid.cells:
        base = sorted(scores[Cell(cell.task, ledger.grid.study.reference, cell.budget)].values())
        if not base:
            continue
        middle = (base[(len(base) - 1) // 2] + base[len(base) // 2]) / 2
        for seed, score in scores[cell].items():
            if score < middle - COLLAPSED:
                found.append({"id": ledger.chosen(cell)[seed]["id"], "score": score, "median": middle})
    return found
