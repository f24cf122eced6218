"""A study's summary as Markdown, beside summary.json and the plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_files
from .plots import save_differences, save_scores
from .rankmaps import RANKS, save_ranks, uneven
from .summary import COLLAPSED, Numbers

TABLE, SUMMARY, DIFFERENCES, SCORES = "table.md", "summary.json", "differences.png", "scores.png"


def write_tables(summary: Numbers, out: Path) -> str:
    """Write table.md, summary.json and the plots into `out`; returns the table."""
    text = table(summary)
    writers = {
        TABLE: lambda path: path.write_text(text, encoding="utf-8"),
        SUMMARY: lambda path: path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8"),
    }
    if any(cell["mean"] is not None for cell in summary["cells"]):
        writers[SCORES] = lambda path: save_scores(summary, path)
    if any(numbers["interval"] for numbers in summary["differences"]):
        writers[DIFFERENCES] = lambda path: save_differences(summary, path)
    if uneven(summary):
        writers[RANKS] = lambda path: save_ranks(summary, path)
    write_files(out, writers)
    return text


def table(summary: Numbers) -> str:
    """All tables, a section each."""
    runs = summary["runs"]
    head = f"# {summary['study']}\n\n{runs['done']} of {runs['known']} runs done, {len(summary['failed'])} failed."
    parts = [head]
    for budget in summary["budgets"]:
        parts += [_scores(summary, budget), _differences(summary, budget)]
    parts += [
        _signs(summary),
        _sufficient(summary),
        _rates(summary),
        _sizes(summary),
        _agreement(summary),
        _failed(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _scores(summary: Numbers, budget: float) -> str:
    """Mean ± deviation at the chosen rate."""
    rows = []
    for arm in summary["arms"]:
        whole = next(m["mean"] for m in summary["means"] if (m["arm"], m["budget"]) == (arm, budget))
        cells = [_score(cell) for cell in _cells(summary, budget, arm)]
        rows.append([arm, *cells, "–" if whole is None else f"{whole:.2f}"])
    note = (
        "Test scores in points: mean ± standard deviation over seeds. (n) where fewer seeds are in than were asked "
        "for, * where more runs may still change the learning rate."
    )
    return f"## Average rank {budget:g}: scores\n\n{note}\n\n" + _grid(["arm", *summary["tasks"], "mean"], rows)


def _score(cell: Numbers) -> str:
    if cell["mean"] is None:
        return "–"
    spread = "" if cell["deviation"] is None else f" ± {cell['deviation']:.2f}"
    few = f" ({cell['seeds']})" if cell["seeds"] < cell["asked"] else ""
    return f"{cell['mean']:.2f}{spread}{few}{'' if cell['settled'] else ' *'}"


def _differences(summary: Numbers, budget: float) -> str:
    rows = []
    for numbers in summary["differences"]:
        if numbers["budget"] != budget or numbers["mean"] is None:
            continue
        tasks = [_difference(numbers["tasks"].get(task)) for task in summary["tasks"]]
        low, high = numbers["interval"]
        fewer = "" if numbers["complete"] else f" of {len(numbers['tasks'])} tasks"
        whole = f"{numbers['mean']:+.2f} [{low:+.2f}, {high:+.2f}]{fewer}"
        rows.append([numbers["arm"], *tasks, whole, _p(numbers["tost"]), numbers["verdict"]])
    if not rows:
        return ""
    note = (
        f"Paired by seed. Per task the mean, with p of the paired t test after Holm's correction over the tasks. The "
        f"mean over tasks has a 95 % bootstrap interval (tasks, then seeds). Equivalent: both one-sided t tests of the "
        f"seeds' means over tasks, {len(summary['seeds'])} seeds asked for."
    )
    columns = ["arm", *summary["tasks"], "mean [95 %]", "p equivalent", "verdict"]
    return f"## Average rank {budget:g}: difference to {summary['reference']}\n\n{note}\n\n" + _grid(columns, rows)


def _difference(numbers: Numbers | None) -> str:
    if numbers is None:
        return "–"
    p = numbers["p_holm"]
    return f"{numbers['mean']:+.2f}" + ("" if p is None else f" (p {_p(p)})")


def _p(value: float | None) -> str:
    return "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}".lstrip("0")


def _signs(summary: Numbers) -> str:
    rows = [[s["arm"], str(s["above"]), str(s["below"]), str(s["cells"]), _p(s["p"])] for s in summary["signs"]]
    whole = _grid(["arm", "above", "below", "cells", "p (sign test)"], rows)
    return f"## Cells (task × budget) above and below {summary['reference']}\n\n{whole}" if rows else ""


def _sufficient(summary: Numbers) -> str:
    """The smallest budget within one standard error of the best, for each arm."""
    rows = []
    for numbers in summary["sufficient"]:
        means = [_with_error(own["mean"], own["error"]) for own in numbers["budgets"]]
        chosen = "–" if numbers["budget"] is None else f"{numbers['budget']:g}"
        rows.append([numbers["arm"], *means, chosen, "–" if numbers["test"] is None else f"{numbers['test']:.2f}"])
    note = (
        "Validation scores, mean over tasks ± standard error over seeds, and the smallest budget that is within one "
        "standard error of the best. Its test score is told and plays no part."
    )
    columns = ["arm", *(f"rank {budget:g}" for budget in summary["budgets"]), "automatic budget", "its test score"]
    return f"## Automatic budget\n\n{note}\n\n" + _grid(columns, rows) if rows else ""


def _with_error(mean: float | None, error: float | None) -> str:
    return "–" if mean is None else f"{mean:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _rates(summary: Numbers) -> str:
    rows = []
    for budget in summary["budgets"]:
        for arm in summary["arms"]:
            rows.append([f"{budget:g}", arm, *(_rate(cell) for cell in _cells(summary, budget, arm))])
    seeds = ", ".join(map(str, summary["rate_seeds"]))
    note = (
        f"The rate with the best mean validation score of seed {seeds}. ↓ and ↑: it is the lowest or highest that was "
        "tried, so a better one may lie beyond."
    )
    return f"## Learning rates\n\n{note}\n\n" + _grid(["rank", "arm", *summary["tasks"]], rows)


def _rate(cell: Numbers) -> str:
    if cell["learning_rate"] is None:
        return "–"
    return f"{cell['learning_rate']:g}" + {"low": " ↓", "high": " ↑", None: ""}[cell["edge"]]


def _sizes(summary: Numbers) -> str:
    """Parameters and time, averaged over tasks."""
    rows = []
    for budget in summary["budgets"]:
        for arm in summary["arms"]:
            cells = [cell for cell in _cells(summary, budget, arm) if cell["parameters"]]
            if cells:
                sizes = [_range([cell["parameters"][key] for cell in cells]) for key in ("final", "peak", "head")]
                seconds = sum(cell["seconds"] for cell in cells) / len(cells)
                rows.append([f"{budget:g}", arm, *sizes, _range([cell["steps"] for cell in cells]), f"{seconds:.0f}"])
    note = "Trained parameters, counted from the tensors; least to most over the tasks. Seconds of training: the mean."
    columns = ["rank", "arm", "final", "peak", "head", "steps", "seconds"]
    return f"## Sizes and time\n\n{note}\n\n" + _grid(columns, rows) if rows else ""


def _range(values: Sequence[float]) -> str:
    low, high = round(min(values)), round(max(values))
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _agreement(summary: Numbers) -> str:
    rows = []
    for numbers in summary["agreement"]:
        correlation = "–" if numbers["correlation"] is None else f"{numbers['correlation']:.2f}"
        shares = (f"{numbers[key]:.2f}" for key in ("overlap", "chance"))
        rows.append([f"{numbers['budget']:g}", numbers["arm"], numbers["task"], *shares, correlation])
    note = (
        "Rank maps of two seeds, mean over pairs: overlap Σ min / Σ max, the same if one map's ranks were dealt out "
        "anew, and Spearman's correlation."
    )
    columns = ["rank", "arm", "task", "overlap", "by chance", "correlation"]
    return f"## Do seeds agree on the ranks?\n\n{note}\n\n" + _grid(columns, rows) if rows else ""


def _failed(summary: Numbers) -> str:
    lines = [f"- {failed['id']}: {failed['error']}" for failed in summary["failed"]]
    for run in summary["collapsed"]:
        shown = f"{run['score']:.2f}, against the reference's median {run['median']:.2f}"
        lines.append(f"- {run['id']} collapsed: {shown}")
    note = f"Runs that failed, and runs more than {COLLAPSED:g} points under the reference's median."
    return f"## Failed\n\n{note}\n\n" + ("\n".join(lines) or "None.")


def _cells(summary: Numbers, budget: float, arm: str) -> list[Numbers]:
    return [cell for cell in summary["cells"] if (cell["budget"], cell["arm"]) == (budget, arm)]


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---", *(["---:"] * (len(columns) - 1))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
