"""The results of benchmarks.tasks as Markdown: one row for each task, and the commands behind it."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import records
from benchmarks.table import markdown

METHODS = ("adalora", "lora")
HEADS = (
    *("task", "rows trained, scored", "steps", "score", "AdaLoRA", "LoRA"),
    *("adapter parameters: AdaLoRA, peak", "AdaLoRA, final", "LoRA", "head", "seconds: AdaLoRA", "LoRA"),
)


def tasks_table(cells: Sequence[records.Record]) -> str:
    """The table, what evaluate and predict gave, the commands."""
    tasks: dict[str, dict[str, records.Record]] = {}
    for cell in cells:
        tasks.setdefault(cell["recipe"], {})[cell["method"]] = cell
    rows = [row for arms in tasks.values() for row in _rows(arms)]
    return "\n\n".join([markdown(HEADS, rows), _again(cells), *(_commands(name, arms) for name, arms in tasks.items())])


def _rows(arms: dict[str, records.Record]) -> list[list[str]]:
    """A row for each score of a task; what does not depend on the score stands in the first."""
    ours, lora = arms["adalora"], arms.get("lora")
    lines = []
    for place, name in enumerate(ours["shown"]):
        values = [f"{arm['scores'][name]:.4g}" if arm else "not run" for arm in (ours, lora)]
        if place:
            lines.append(["", "", "", name, *values, *[""] * 6])
            continue
        counts = [ours["parameters"]["peak"], ours["parameters"]["final"]]
        sizes = [f"{count:,}" for count in counts] + [f"{lora['parameters']['final']:,}" if lora else "–"]
        times = [_seconds(arm) if arm else "–" for arm in (ours, lora)]
        lines.append(
            [
                ours["recipe"],
                f"{ours['rows']['train']:,}, {ours['rows'][ours['split']]:,} ({ours['split']})",
                f"{ours['steps']:,}",
                name,
                *values,
                *sizes,
                f"{ours['parameters']['head']:,}",
                *times,
            ]
        )
    return lines


def _seconds(cell: records.Record) -> str:
    """A resumed run knows only the time since then."""
    since = f" from step {cell['resumed_from']:,} on" if cell["resumed_from"] else ""
    return f"{cell['train_seconds']:,.0f}{since}"


def _again(cells: Sequence[records.Record]) -> str:
    largest = max(
        abs(value - cell["evaluated"][name]) / max(1.0, abs(value))
        for cell in cells
        for name, value in cell["scores"].items()
    )
    answers = sum(cell["answers"] for cell in cells)
    return (
        f"`adalora evaluate` on the saved folders gave the scores of the runs again, all {len(cells)} of them (largest "
        f"difference {largest:.1e}); `adalora predict` answered {answers:,} rows."
    )


def _commands(name: str, arms: dict[str, records.Record]) -> str:
    lines = "\n".join(command for arm in arms.values() for command in arm["commands"])
    return f"<details><summary>Commands of {name}</summary>\n\n```\n{lines}\n```\n\n</details>"
