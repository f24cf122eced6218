"""Where a study stands: its grid and the results so far → rates chosen, runs still to be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import ConfigError
from .choice import Choice, choose
from .grid import Cell, Grid, Run
from .results import Record, points


class Ledger:
    """Results of the runs of one grid, by name. Other studies' results in the same folder are left alone."""

    def __init__(self, grid: Grid, records: Iterable[Record]) -> None:
        """Raises ConfigError for a result of another recipe than the grid's."""
        self.grid = grid
        self.records: dict[str, Record] = {}
        self._cells: dict[Cell, list[Record]] = {cell: [] for cell in grid.cells}
        by_cell: dict[Cell, list[Record]] = {}
        for record in records:
            by_cell.setdefault(_cell_of(record), []).append(record)
        for cell in grid.cells:  # those that others start from come first
            for record in by_cell.get(cell, []):
                self._check(Run(cell, record["learning_rate"], record["seed"]), record)
                self.add(record)

    def add(self, record: Record) -> None:
        """A result that has come in."""
        self.records[record["id"]] = record
        self._cells[_cell_of(record)].append(record)

    def result(self, run: Run) -> Record | None:
        """What a run gave, if it has been done."""
        return self.records.get(run.id)

    def choice(self, cell: Cell) -> Choice:
        """The cell's learning rate, by validation scores."""
        study = self.grid.study
        scores: dict[float, dict[int, float | None]] = {}
        for record in self.of(cell):
            if record["seed"] in study.choosing:
                scores.setdefault(record["learning_rate"], {})[record["seed"]] = points(record, "validation")
        return choose(study.arms[cell.arm].learning_rates, scores, study.choosing, study.max_extensions)

    def of(self, cell: Cell) -> list[Record]:
        """All results of a cell, at any rate."""
        return self._cells[cell]

    def chosen(self, cell: Cell) -> dict[int, Record]:
        """Finished runs at the chosen rate, by seed."""
        rate = self.choice(cell).rate
        if rate is None:
            return {}
        found = {seed: self.result(Run(cell, rate, seed)) for seed in self.grid.study.seeds}
        return {seed: record for seed, record in found.items() if record and record["status"] == "finished"}

    def sources(self, run: Run) -> dict[Cell, Run] | None:
        """The runs that one starts from: those of its seed at the chosen rate. None if that is still open."""
        needed = {cell: self.choice(cell) for cell in self.grid.sources(run.cell)}
        if not all(choice.settled and choice.rate is not None for choice in needed.values()):
            return None
        return {cell: Run(cell, choice.rate, run.seed) for cell, choice in needed.items() if choice.rate is not None}

    def wanted(self, cell: Cell) -> list[Run]:
        """All runs of a cell that are known to be needed, done or not."""
        study, choice = self.grid.study, self.choice(cell)
        runs = [Run(cell, rate, seed) for rate in choice.wanted for seed in study.choosing]
        if choice.settled and choice.rate is not None:
            runs += [Run(cell, choice.rate, seed) for seed in study.seeds if seed not in study.choosing]
        return runs

    def missing(self, only: Mapping[str, set[str]] | None = None) -> list[Run]:
        """Runs still to be done as far as they are known: all arms with the first seed, then with the second, …"""
        study = self.grid.study
        arms, tasks = list(study.arms), list(study.tasks)

        def place(run: Run) -> tuple[float, ...]:
            cell = run.cell
            positions = study.seeds.index(run.seed), study.budgets.index(cell.budget), tasks.index(cell.task)
            return (*positions, run.rate, arms.index(cell.arm))

        runs = (run for cell in self.grid.cells for run in self.wanted(cell))
        return sorted((run for run in runs if run.id not in self.records and _allowed(run, only or {})), key=place)

    def pending(self, only: Mapping[str, set[str]] | None = None) -> list[Run]:
        """Those of them that can start now."""
        return [run for run in self.missing(only) if self.sources(run) is not None]

    def _check(self, run: Run, record: Record) -> None:
        sources = self.sources(run)
        # A run that came from another one stands for itself while that one's rate is being chosen anew.
        if sources is not None and record["digest"] != self.grid.digest(run, sources):
            raise ConfigError(
                f"{record['id']} in {str(self.grid.out)!r} was trained with other settings than {self.grid.name} has "
                "now. Choose another --out, or remove its line from results.jsonl to have it done again."
            )


def parse_only(text: str | None, grid: Grid) -> dict[str, set[str]]:
    """`task=trec,task=sst2,arm=lora` → allowed values by key. Raises ConfigError for what the study does not have."""
    study = grid.study
    known = {
        "task": list(study.tasks),
        "arm": list(study.arms),
        "budget": [f"{budget:g}" for budget in study.budgets],
        "seed": [str(seed) for seed in study.seeds],
    }
    allowed: dict[str, set[str]] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        key, _, value = (side.strip() for side in part.partition("="))
        if key not in known or value not in known[key]:
            shown = "; ".join(f"{name}={'|'.join(values)}" for name, values in known.items())
            raise ConfigError(f"--only holds {part!r}; {grid.name} has {shown}. Example: --only task=trec,arm=lora")
        allowed.setdefault(key, set()).add(value)
    return allowed


def _cell_of(record: Record) -> Cell:
    return Cell(record["task"], record["arm"], float(record["budget"]))


def _allowed(run: Run, only: Mapping[str, set[str]]) -> bool:
    cell = run.cell
    values = {"task": cell.task, "arm": cell.arm, "budget": f"{cell.budget:g}", "seed": str(run.seed)}
    return all(values[key] in allowed for key, allowed in only.items())
