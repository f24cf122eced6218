"""A study file: which arms are compared, on which tasks, at which budgets, with which seeds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from ..errors import ConfigError, did_you_mean
from ..files import is_file
from ..sections import Section
from ..yamlfiles import load_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # names become parts of folder names
_EXAMPLES = {"tasks": "{trec: {recipe: trec}}", "arms": "{lora: {method: {name: lora, r: $r}, learning_rates: [1e-3]}}"}

Rate = Annotated[float, Field(gt=0, lt=float("inf"))]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Budget = Annotated[float, Field(gt=0, lt=float("inf"))]


class StudyTask(Section):
    """A recipe for its model, data and training; its method section says which matrices are adapted.

    `prepare: docstrings` harvests the demo's data, and the recipe's files are those.
    """

    recipe: str
    set: dict[str, Any] = Field(default_factory=dict, description="section.key: value, on top of the recipe")
    prepare: Literal["docstrings"] | None = None


class StudyArm(Section):
    """One way to adapt: a method section, in which `$r` is the budget, and the learning rates to choose from."""

    method: dict[str, Any]
    learning_rates: list[Rate] = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict, description="section.key: value, on top of task and recipe")


class Study(Section):
    """Everything that is decided before the first run."""

    seeds: list[Seed] = Field(min_length=1)
    rate_seeds: list[Seed] = Field(default_factory=list, description="those that choose the learning rate; none: all")
    budgets: list[Budget] = Field(min_length=1)
    reference: str
    tasks: dict[str, StudyTask] = Field(min_length=1)
    arms: dict[str, StudyArm] = Field(min_length=1)
    max_extensions: int = Field(2, ge=0, description="steps by which a grid may grow on either side")

    @property
    def choosing(self) -> list[int]:
        """The seeds that run with every learning rate."""
        return self.rate_seeds or self.seeds


def load_study(source: str) -> Study:
    """Read a built-in study by name, or a YAML file by path.

    A recipe that is a file is taken relative to the study's own folder. Raises ConfigError, which names file and
    key path, for whatever cannot be meant.
    """
    built_in = source in study_names() and not is_file(source)
    file = resources.files(__package__.rpartition(".")[0]) / "studies" / f"{source}.yaml" if built_in else Path(source)
    if not (built_in or is_file(source)):
        raise ConfigError(f"{source!r} is neither a study file nor a built-in study; " + known_studies(source))
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold seeds, budgets, reference, tasks and arms; it holds {values!r:.60}.")
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors())) from error
    _check(study, source)
    if not built_in:
        for task in study.tasks.values():
            beside = Path(source).parent / task.recipe
            task.recipe = str(beside) if is_file(beside) else task.recipe
    return study


def study_names() -> list[str]:
    """Names of the built-in studies."""
    folder = resources.files(__package__.rpartition(".")[0]) / "studies"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def known_studies(source: str) -> str:
    """The nearest built-in study as a question, or the list of them."""
    return did_you_mean(source, study_names())


def _check(study: Study, source: str) -> None:
    """What the types alone do not say. Raises ConfigError."""
    for section, names in (("tasks", study.tasks), ("arms", study.arms)):
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{source}: {section}.{name} cannot be part of a folder's name; use letters, digits and . _ + -"
                )
    if study.reference not in study.arms:
        known = did_you_mean(study.reference, list(study.arms))
        raise ConfigError(f"{source}: reference is {study.reference!r}, which is no arm; {known}")
    counts = {name: len(arm.learning_rates) for name, arm in study.arms.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(
            f"{source}: every arm must begin with the same number of learning rates, or the one with more has had "
            f"more chances; they have {shown}."
        )
    if strangers := sorted(set(study.rate_seeds) - set(study.seeds)):
        raise ConfigError(f"{source}: rate_seeds holds {strangers}, which seeds does not; it has {study.seeds}.")
    lists: dict[str, Sequence[float]] = {"seeds": study.seeds, "rate_seeds": study.rate_seeds, "budgets": study.budgets}
    lists |= {f"arms.{name}.learning_rates": arm.learning_rates for name, arm in study.arms.items()}
    for key, values in lists.items():
        if len(set(values)) < len(values):
            raise ConfigError(f"{source}: {key} holds a value twice: {values}.")


def _explain(error: Any) -> str:
    path, value = ".".join(str(part) for part in error["loc"]), error["input"]
    if error["type"] == "missing":
        example = f", e.g. {path}: {_EXAMPLES[path]}" if path in _EXAMPLES else ""
        return f"{path} is missing{example}"
    if error["type"] != "extra_forbidden":
        return f"{path} is {value!r:.80}: {error['msg'].lower()}"
    owners: dict[str, type[Section]] = {"tasks": StudyTask, "arms": StudyArm}
    known = list(owners.get(str(error["loc"][0]), Study).model_fields)
    return f"there is no key {path!r}; " + did_you_mean(str(error["loc"][-1]), known)
