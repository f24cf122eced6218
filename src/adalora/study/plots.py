"""Plots of a study, by matplotlib: differences to the reference, and scores by task, both with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .summary import Numbers

matplotlib.rcParams["svg.hashsalt"] = "adalora"  # equal inputs give equal files

_COLORS = ("#1b7837", "#762a83", "#2166ac", "#b2182b", "#8c510a", "#4d4d4d", "#01665e", "#c51b7d")
_MARKERS = "osD^vPX*"  # so that colour is not all there is
_SPREAD = 0.6  # width that the arms of one budget or task share


def save_differences(summary: Numbers, path: Path) -> None:
    """Mean difference to the reference over tasks: budgets across, a point with its 95 % interval for each arm."""
    arms = [arm for arm in summary["arms"] if arm != summary["reference"]]
    figure = Figure(figsize=(max(5.0, 2.0 + 1.6 * len(summary["budgets"])), 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhspan(-0.5, 0.5, color="0.93", label="± 0.5")
    axes.axhline(0, color="0.4", linewidth=0.8)
    for index, arm in enumerate(arms):
        shown = [d for d in summary["differences"] if d["arm"] == arm and d["interval"]]
        if not shown:
            continue
        x = [summary["budgets"].index(d["budget"]) + _offset(index, len(arms)) for d in shown]
        y = [d["mean"] for d in shown]
        low, high = zip(*(d["interval"] for d in shown), strict=True)
        # A percentile interval need not hold the mean.
        below = [max(mean - end, 0) for mean, end in zip(y, low, strict=True)]
        above = [max(end - mean, 0) for mean, end in zip(y, high, strict=True)]
        axes.errorbar(x, y, [below, above], label=arm, **_style(summary["arms"].index(arm)))
    axes.set_xticks(range(len(summary["budgets"])), [f"{budget:g}" for budget in summary["budgets"]])
    axes.set_xlabel("average final rank")
    axes.set_ylabel(f"points above {summary['reference']}, mean over tasks")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def save_scores(summary: Numbers, path: Path) -> None:
    """A panel for each task: budgets across, for each arm the mean with its 95 % t interval, and each seed."""
    tasks, arms = summary["tasks"], summary["arms"]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    for place, task in enumerate(tasks, 1):
        axes = figure.add_subplot(rows, columns, place)
        for index, arm in enumerate(arms):
            _arm_scores(axes, summary, task, arm, index)
        axes.set_title(task, fontsize=10)
        axes.set_xticks(range(len(summary["budgets"])), [f"{budget:g}" for budget in summary["budgets"]])
    figure.supxlabel("average final rank", fontsize=9)
    figure.supylabel("test score, points", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(arms), 5), fontsize=8)
    figure.savefig(path, dpi=150)


def _arm_scores(axes: matplotlib.axes.Axes, summary: Numbers, task: str, arm: str, index: int) -> None:
    own = [cell for cell in summary["cells"] if (cell["task"], cell["arm"]) == (task, arm) and cell["scores"]]
    offset = _offset(index, len(summary["arms"]))
    x = [summary["budgets"].index(cell["budget"]) + offset for cell in own]
    color = _COLORS[index % len(_COLORS)]
    for place, cell in zip(x, own, strict=True):
        axes.plot([place] * len(cell["scores"]), cell["scores"], ".", color=color, markersize=3, alpha=0.6)
    errors = [cell["half_width"] or 0.0 for cell in own]
    axes.errorbar(x, [cell["mean"] for cell in own], errors, label=arm, **_style(index))


def _offset(index: int, count: int) -> float:
    return _SPREAD * ((index + 0.5) / count - 0.5)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLORS[index % len(_COLORS)],
        "fmt": _MARKERS[index % len(_MARKERS)],
        "capsize": 3,
        "markersize": 5,
        "linewidth": 1,
    }
