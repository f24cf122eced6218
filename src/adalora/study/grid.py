"""A study's runs: their names, their recipes, and what `$r` and its kind stand for in a method section."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..methods import build_method
from ..recipe import Recipe, load_recipe
from ..sections import METRICS
from .design import Study

_TOKEN = re.compile(r"\$(?P<times>\d+(?:\.\d+)?)?(?P<unit>r|B)|\$(?P<seed>seed)|\$run:(?P<run>[\w.+-]+)(?P<rest>/.+)?")
_TOKENS = "$r (the budget), $1.5r (a multiple, rounded up), $B (its size in parameters), $seed, or $run:ARM/FOLDER"
# Which matrices are adapted belongs to the task, so that all arms adapt the same ones.
_SHARED = ("target_modules", "exclude_modules", "modules_to_save")
_FORCED = {"training.eval_strategy": "no", "training.save_strategy": "no"}  # scored once, at the end
_NO_POINTS = ("loss", "perplexity")


@dataclass(frozen=True)
class Cell:
    """What gets one learning rate."""

    task: str
    arm: str
    budget: float

    def __str__(self) -> str:
        return f"{self.task}-{self.arm}-b{self.budget:g}"


@dataclass(frozen=True)
class Run:
    """One training."""

    cell: Cell
    rate: float
    seed: int

    @property
    def id(self) -> str:
        """Its folder's name, and its name in results.jsonl."""
        return f"{self.cell}-lr{self.rate:g}-s{self.seed}"


@dataclass
class Grid:
    """All cells of a study, and the recipe of each run.

    `out` is the study's folder, `data` the one to which the recipes' paths are relative, `unit` gives the sum of
    (in + out) over the matrices that a recipe's `$B` is counted on.
    """

    study: Study
    out: Path
    data: Path
    unit: Callable[[Recipe], int]
    name: str = "study"  # for messages
    _units: dict[str, int] = field(default_factory=dict)

    @cached_property
    def cells(self) -> list[Cell]:
        """In the order of the file: budgets, tasks, arms."""
        study = self.study
        return [Cell(task, arm, budget) for budget in study.budgets for task in study.tasks for arm in study.arms]

    def sources(self, cell: Cell) -> set[Cell]:
        """Cells whose runs this one starts from."""
        texts = _strings(self.study.arms[cell.arm].method)
        found = (match["run"] for text in texts if (match := _TOKEN.fullmatch(text)) and match["run"])
        return {Cell(cell.task, arm, cell.budget) for arm in found}

    def portable(self, run: Run, sources: Mapping[Cell, Run]) -> Recipe:
        """The run's recipe as any machine has it: paths relative. Raises ConfigError with the key path."""
        return self._recipe(run, sources, "runs/")

    def placed(self, run: Run, sources: Mapping[Cell, Run]) -> Recipe:
        """The same with the paths of this machine, as it is trained."""
        recipe, made = self._recipe(run, sources, f"{(self.out / 'runs').absolute()}/"), self._task(run).prepare
        root = self.out / "data" / made if made else self.data
        if recipe.data.name is not None:
            return recipe
        splits = {name: getattr(recipe.data, name) for name in ("train", "validation", "test")}
        files = {name: str((root / path).absolute()) if path else None for name, path in splits.items()}
        return recipe.model_copy(update={"data": recipe.data.model_copy(update=files)})

    def digest(self, run: Run, sources: Mapping[Cell, Run]) -> str:
        """Of the recipe, so that a result is never taken for that of another one."""
        return digest_of(self.portable(run, sources).model_dump(mode="json"))

    def first(self, cell: Cell) -> Run:
        """Any run of the cell, to check its recipe."""
        return Run(cell, self.study.arms[cell.arm].learning_rates[0], self.study.seeds[0])

    def _task(self, run: Run) -> Any:
        return self.study.tasks[run.cell.task]

    def _recipe(self, run: Run, sources: Mapping[Cell, Run], runs: str) -> Recipe:
        task, arm = self._task(run), self.study.arms[run.cell.arm]
        where = f"{self.name}: tasks.{run.cell.task}, arms.{run.cell.arm}"
        try:
            given = task.set | arm.set | _FORCED | {"training.learning_rate": run.rate}
            base = load_recipe(task.recipe, [f"{key}={json.dumps(value)}" for key, value in given.items()], run.seed)
            _refuse_losses(base)
            shared = {key: base.method[key] for key in _SHARED if base.method.get(key) is not None}

            def fill(match: re.Match[str]) -> Any:
                if match["seed"]:
                    return run.seed
                if match["run"]:
                    source = sources.get(Cell(run.cell.task, match["run"], run.cell.budget))
                    # Before it has run, what stands for it is only checked as far as it goes without files.
                    return f"{runs}{source.id if source else match['run']}{match['rest'] or ''}"
                times = Fraction(match["times"] or 1) * Fraction(str(run.cell.budget))
                return math.ceil(times) if match["unit"] == "r" else int(times * self._unit(run, base, shared))

            method = _filled(arm.method, fill, f"arms.{run.cell.arm}.method")
            # What the task says goes to the methods that adapt matrices; others have no such options. An arm that
            # starts from another run has its matrices from there.
            known = build_method(method).options() if shared and not self.sources(run.cell) else {}
            return base.model_copy(update={"method": {k: v for k, v in shared.items() if k in known} | method})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def _unit(self, run: Run, base: Recipe, shared: Mapping[str, Any]) -> int:
        if run.cell.task not in self._units:
            adapted = base.model_copy(update={"method": {"name": "adalora", **shared}})
            self._units[run.cell.task] = self.unit(adapted)
        return self._units[run.cell.task]


def digest_of(recipe: Mapping[str, Any]) -> str:
    """Of a recipe's values. Keys left open count for nothing, so that one which a later version adds changes none."""
    said = {
        name: {key: value for key, value in section.items() if value is not None or name == "method"}
        if isinstance(section, dict)
        else section
        for name, section in recipe.items()
        if section is not None
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def check_arms(study: Study, name: str) -> None:
    """Raise ConfigError for an arm that starts from one which is not in front of it."""
    arms = list(study.arms)
    for arm in arms:
        for text in _strings(study.arms[arm].method):
            match = _TOKEN.fullmatch(text)
            if match and match["run"] and match["run"] not in arms[: arms.index(arm)]:
                raise ConfigError(f"{name}: arms.{arm} starts from {text!r}; that arm must stand in front of it.")


def _refuse_losses(recipe: Recipe) -> None:
    metric = recipe.metric or METRICS[recipe.task][0]
    if metric in _NO_POINTS:
        raise ConfigError(f"the metric is {metric!r}; runs are compared in points of a score, the higher the better.")


def _filled(value: Any, fill: Callable[[re.Match[str]], Any], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, fill, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, fill, where) for inner in value]
    if not (isinstance(value, str) and value.startswith("$")):
        return value
    match = _TOKEN.fullmatch(value)
    if match is None:
        raise ConfigError(f"{where} is {value!r}; what begins with $ must be {_TOKENS}.")
    return fill(match)


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for inner in (value.values() if isinstance(value, dict) else value) for text in _strings(inner)]
    return [value] if isinstance(value, str) else []
