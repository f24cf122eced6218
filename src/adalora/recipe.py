"""A recipe: everything a run needs, in one YAML file that reruns it.

Sections are checked by pydantic with unknown keys refused. `method` and `training` are passed on to the
method's own options and to transformers.TrainingArguments, which know their fields themselves.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number; PyYAML's own rule wants a dot and a signed exponent."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


class Section(BaseModel):
    """Base of all sections: no unknown key passes."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSection(Section):
    """The pre-trained model: a hub name, a folder, or `package:NAME` for an encoder installed by pip."""

    name_or_path: str
    revision: str | None = None
    trust_remote_code: bool = False
    hub_id: str | None = Field(None, description="name for card and adapter if name_or_path is a local copy")


class DataSection(Section):
    """Where the rows are: a hub data set by `name`, or local jsonl, csv, tsv or parquet files.

    With `name`, `train`, `validation` and `test` are split names; without, they are files. If there is no
    validation set, a tenth of the training set is held out.
    """

    name: str | None = None
    config: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    max_length: int = Field(128, ge=4)


class Recipe(Section):
    """One run."""

    task: Literal["classification"] = "classification"
    model: ModelSection
    data: DataSection
    method: dict[str, Any]
    training: dict[str, Any] = {}
    metric: Literal["accuracy", "macro_f1", "matthews", "pearson", "spearman"] | None = None
    seed: int = 0
    max_minutes: float | None = Field(None, gt=0)

    def dump(self) -> str:
        """YAML that `load_recipe` reads to an equal recipe."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def load_recipe(source: str, settings: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read a built-in recipe by name, or a YAML file by path; `settings` are `section.key=value` on top.

    Raises ConfigError for a source that is neither, YAML that is none, a key that does not exist, or a value
    of the wrong type; it names file and key path.
    """
    text = _read(source)
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold sections such as model, data and method; it holds {values!r:.60}.")
    for setting in settings:
        _apply(values, setting)
    if seed is not None:
        values["seed"] = seed
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors())) from error


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    folder = resources.files(__package__) / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """The nearest known key as a question, or the list of them."""
    near = difflib.get_close_matches(key, known, n=1)
    some = ", ".join(known[:24]) + (", …" if len(known) > 24 else "")
    return f"did you mean {near[0]!r}?" if near else f"known are: {some}."


def _read(source: str) -> str:
    if source in recipe_names():
        return (resources.files(__package__) / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{source!r} is neither a recipe file nor a built-in recipe; " + did_you_mean(source, recipe_names())
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recipe {source!r}: {error}") from error


def _apply(values: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not key:
        raise ConfigError(f"--set {setting!r} must have the form section.key=value, e.g. training.learning_rate=1e-3.")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {setting!r}: {section!r} is a value, not a section.")
        values = inner
    try:
        values[key] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: the value is not valid YAML ({error}).") from error


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{path} is {error['input']!r:.80}: {error['msg'].lower()}"
    section: Any = Recipe
    for part in error["loc"][:-1]:
        section = section.model_fields[part].annotation
    return f"there is no key {path!r}; " + did_you_mean(str(error["loc"][-1]), list(section.model_fields))
