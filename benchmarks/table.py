"""Results as Markdown tables, and docs/performance.md with the current ones: `python -m benchmarks.table`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import records

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"

FLOOR, LORA, OURS = "frozen floor", "PEFT LoRA", "adalora"
TITLES = {
    "budget": "While the budget falls: rank 12, an allocation in every step",
    "compacted": "After compaction: 12 → 4 on average, against LoRA of rank 4",
}
MIB = 2**20


def step_table(cells: Sequence[records.Record]) -> str:
    """One table for each stage: ratios to the floor, then ratios to PEFT's LoRA."""
    return "\n\n".join(
        f"**{title}**\n\n{_step_stage(chosen)}"
        for stage, title in TITLES.items()
        if (chosen := [cell for cell in cells if cell["stage"] == stage])
    )


def counts_table(cells: Sequence[records.Record]) -> str:
    """One table for each cell, a row for each arm."""
    return "\n\n".join(_counts_cell(cell) for cell in cells)


def start_table(cells: Sequence[records.Record]) -> str:
    """A row for each machine's record."""
    rows = [
        [
            *(_spread(cell[name], "{:.1f}") for name in ("import adalora", "every public name")),
            _spread(cell["adalora --help"], "{:.0f}"),
            "yes" if cell["help imports torch"] else "no",
        ]
        for cell in cells
    ]
    heads = ["`import adalora`, ms", "`from adalora import *`, ms", "`adalora --help`, ms", "does it load torch?"]
    return markdown(heads, rows)


TABLES: dict[str, Callable[[Sequence[records.Record]], str]] = {
    "step": step_table,
    "counts": counts_table,
    "start": start_table,
}


def regenerate(document: str, name: str, cells: Sequence[records.Record]) -> str:
    """`document` with the table `name` between its two markers. Raises ValueError without them."""
    head, tail = _around(document, name)
    body = f"{TABLES[name](cells)}\n\n{environments(cells)}" if cells else "Not measured yet."
    return f"{head}{body}{tail}"


def filled(document: str, name: str, body: str) -> str:
    """`document` with `body` between the two markers of `name`. Raises ValueError without them."""
    head, tail = _around(document, name)
    return f"{head}{body}{tail}"


def _around(document: str, name: str) -> tuple[str, str]:
    """What stands before and behind the place of a table, markers included."""
    opening, closing = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    head, found, rest = document.partition(opening)
    _, closed, tail = rest.partition(closing)
    if not (found and closed):
        raise ValueError(f"the document has no {opening} … {closing}; put the two lines where the table goes.")
    return f"{head}{opening}\n", f"\n{closing}{tail}"


def environments(cells: Sequence[records.Record]) -> str:
    """One line for each environment that the cells were measured in."""
    shared: dict[str, int] = {}
    for cell in cells:
        line = _environment(cell["environment"])
        shared[line] = shared.get(line, 0) + 1
    several = len(shared) > 1
    return "\n\n".join(f"{line}{f' ({count} cells)' if several else ''}" for line, count in shared.items())


def main() -> None:
    """Bring the tables of docs/performance.md up to date with results/*.json."""
    document = DOCUMENT.read_text()
    for name in TABLES:
        cells = records.load(records.RESULTS / f"{name}.json")
        document = regenerate(document, name, sorted(cells.values(), key=_place))
    DOCUMENT.write_text(document)


def _step_stage(cells: Sequence[records.Record]) -> str:
    arms = list(dict.fromkeys(name for cell in cells for name in cell["arms"] if name != FLOOR))
    ours = [name for name in arms if name != LORA]
    pruned = cells[0]["stage"] == "compacted"
    heads = ["model", "tokens", "threads", "dropout", *(["matrices at rank 0"] if pruned else []), "floor, ms"]
    heads += [f"{name} / floor" for name in arms] + [f"{name} / LoRA" for name in ours]
    rows = [
        [
            _label(cell),
            f"{cell['tokens']:,}",
            str(cell["threads"]),
            f"{cell['dropout']:g}",
            *([str(cell["arms"][OURS]["empty"])] if pruned else []),
            f"{cell['arms'][FLOOR]['ms']:.0f}",
            *(_ratio(cell, name, "floor") for name in arms),
            *(_ratio(cell, name, "lora") for name in ours),
        ]
        for cell in cells
    ]
    return markdown(heads, rows)


def _ratio(cell: records.Record, name: str, to: str) -> str:
    """The ratio of an arm to another, or a dash in a cell from before the arm was there."""
    return _spread(cell["arms"][name][to]) if name in cell["arms"] else "–"


def _counts_cell(cell: records.Record) -> str:
    heads = ["", "forward", "backward", "bookkeeping", "calls in all", "host syncs", "optimizer state, B/param"]
    heads += ["importance state, B/param", "saved for backward, MiB", "peak, MiB", "peak / LoRA"]
    lora = cell["arms"][LORA]["peak"]
    rows = []
    for name, row in cell["arms"].items():
        adapter = name != FLOOR  # what trains in the floor is no adapter
        rows.append(
            [
                name,
                *(f"{row['calls'][phase]:,}" for phase in ("forward", "backward", "bookkeeping")),
                f"{row['total']:,}",
                str(row["syncs"]),
                *(
                    f"{row[state] / row['trained']:.2f}" if adapter else "–"
                    for state in ("optimizer state", "importance state")
                ),
                f"{row['saved'] / MIB:.1f}",
                f"{row['peak'] / MIB:.1f}",
                f"{row['peak'] / lora:.3f}",
            ]
        )
    title = f"{cell['shape']}, {cell['tokens']:,} tokens, dropout {cell['dropout']:g}. {TITLES[cell['stage']]}"
    return f"**{title}**\n\n{markdown(heads, rows)}"


def _label(cell: records.Record) -> str:
    """The model, and what is not the rule: fp32 on the CPU with torch's default AdamW."""
    usual = {"device": "cpu", "dtype": "float32", "update": "fused"}
    return " ".join([cell["shape"], *(cell[name] for name, value in usual.items() if cell[name] != value)])


def _environment(environment: records.Record) -> str:
    processor = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "peft", "transformers"))
    allocator = environment["allocator"]
    settings = ", ".join(f"{name}={value}" for name, value in allocator.items()) or "all defaults"
    return f"Measured on {processor}; {versions}, Python {environment['python']}; allocator: {settings}."


def _spread(quartiles: Sequence[float], form: str = "{:.2f}") -> str:
    low, median, high = (form.format(value) for value in quartiles)
    return f"{median} [{low}, {high}]"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def _place(cell: records.Record) -> str:
    """What rows are sorted by: numbers by value."""
    order = [cell.get(name, 0) for name in ("stage", "device", "dtype", "shape", "tokens", "threads", "dropout")]
    return json.dumps([f"{item:012.4f}" if isinstance(item, int | float) else item for item in order])


if __name__ == "__main__":
    main()
