"""Pictures of a run, by matplotlib: the heat map of ranks (Figure 3 of the paper) and the budget curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..report import RankReport, short_labels
from ..schedule import Schedule

matplotlib.rcParams["svg.hashsalt"] = "adalora"  # equal inputs give equal files


def save_heatmap(report: RankReport, path: Path) -> None:
    """Kinds of matrix down, layers across, the rank written in each cell."""
    kinds, layers, ranks = report.grid()
    figure = Figure(figsize=(max(3.5, 1.8 + 0.45 * len(layers)), 1.0 + 0.4 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    top = max([row.capacity for row in report.rows] + [1])
    values = [[float("nan") if rank is None else rank for rank in row] for row in ranks]
    axes.imshow(values, cmap="YlGn", vmin=0, vmax=top, aspect="auto")
    for y, row in enumerate(ranks):
        for x, rank in enumerate(row):
            if rank is not None:
                axes.text(x, y, str(rank), ha="center", va="center", color="white" if rank > 0.6 * top else "black")
    axes.set_xticks(range(len(layers)), ["–" if layer is None else str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), short_labels(kinds))
    axes.set_xlabel("layer")
    axes.set_title(f"final ranks, {report.total_rank} triplets", fontsize=10)
    figure.savefig(path, dpi=150)


def save_budget_curve(
    schedule: Schedule, live: Sequence[tuple[int, int]], reached: int, path: Path, unit: str = "triplets"
) -> None:
    """The schedule's budget at each of the `reached` steps, and (step, spent) after each allocation, in `unit`s."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    steps = range(min(reached, schedule.total_step))
    axes.plot(steps, [schedule.budget(step) for step in steps], color="tab:green", label="budget")
    if live:
        axes.plot(*zip(*live, strict=True), ".", color="black", markersize=3, label="live after allocation")
    for step in (schedule.tinit, schedule.freeze_step):
        if step < reached:
            axes.axvline(step, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)
