"""Where each arm put its budget: a heat map for each task, layers across and kinds of matrices down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.axes
from matplotlib.figure import Figure

from ..report import short_labels, split_name
from .summary import Numbers

RANKS = "ranks.png"


def rank_grid(ranks: Mapping[str, float]) -> tuple[list[str], list[int | None], list[list[float | None]]]:
    """(kinds, layers, ranks): ranks[i][j] of kind i in layer j, None where there is no such matrix."""
    places = {split_name(name): rank for name, rank in ranks.items()}
    kinds = list(dict.fromkeys(kind for _, kind in places))
    layers: list[int | None] = [*sorted({layer for layer, _ in places if layer is not None})]
    layers += [None] if any(layer is None for layer, _ in places) else []
    return kinds, layers, [[places.get((layer, kind)) for layer in layers] for kind in kinds]


def uneven(summary: Numbers) -> list[Numbers]:
    """Cells whose matrices do not all have the same rank: those of arms that allocate."""
    return [cell for cell in summary["cells"] if cell["ranks"] and len(set(cell["ranks"].values())) > 1]


def save_ranks(summary: Numbers, path: Path) -> None:
    """A row of maps for each arm and budget that allocates, a map for each task, mean ranks over the seeds."""
    cells = {(cell["budget"], cell["arm"], cell["task"]): cell for cell in uneven(summary)}
    rows = [
        (b, arm) for b in summary["budgets"] for arm in summary["arms"] if any(key[:2] == (b, arm) for key in cells)
    ]
    tasks = summary["tasks"]
    sizes = [rank_grid(cell["ranks"]) for cell in cells.values()]
    wide, high = (max(len(size[place]) for size in sizes) for place in (1, 0))
    figure = Figure(figsize=((1.6 + 0.32 * wide) * len(tasks), (0.6 + 0.3 * high) * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(tasks), squeeze=False)
    for (budget, arm), line in zip(rows, panels, strict=True):
        for task, axes in zip(tasks, line, strict=True):
            axes.set_axis_off()
            if cell := cells.get((budget, arm, task)):
                axes.set_axis_on()
                _map(axes, cell["ranks"], top=4 * budget, labels=task == tasks[0])
                axes.set_title(f"{task}: {arm}, rank {budget:g}", fontsize=7)
    figure.savefig(path, dpi=150)


def _map(axes: matplotlib.axes.Axes, ranks: Mapping[str, float], top: float, labels: bool) -> None:
    kinds, layers, grid = rank_grid(ranks)
    values = [[float("nan") if rank is None else rank for rank in row] for row in grid]
    axes.imshow(values, cmap="Greens", vmin=0, vmax=top, aspect="auto")
    for i, row in enumerate(grid):
        for j, rank in enumerate(row):
            if rank is not None:
                axes.text(
                    j, i, f"{rank:.1f}", ha="center", va="center", fontsize=6, color="w" if rank > top / 2 else "k"
                )
    axes.set_yticks(range(len(kinds)), short_labels(kinds) if labels else [""] * len(kinds), fontsize=6)
    axes.set_xticks(range(len(layers)), ["–" if layer is None else str(layer) for layer in layers], fontsize=6)
