"""A recipe: everything a run needs, in one YAML file that reruns it.

Sections are checked by pydantic with unknown keys refused. `method` and `training` are passed on to the
method's own options and to transformers.TrainingArguments, which know their fields themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator

from .errors import ConfigError, did_you_mean
from .files import is_file
from .sections import DATA, METRICS, DataSection, Section
from .yamlfiles import dump_yaml, load_yaml

# A key to show where a section is meant.
_EXAMPLES = {"model": "name_or_path", "data": "train", "method": "name", "training": "learning_rate"}


class ModelSection(Section):
    """The pre-trained model: a hub name, a folder, or `package:NAME` for an encoder installed by pip."""

    name_or_path: str
    revision: str | None = None
    trust_remote_code: bool = False
    hub_id: str | None = Field(None, description="name for card and adapter if name_or_path is a local copy")
    config: dict[str, Any] = Field(
        default_factory=dict, description="entries of the model's own configuration, e.g. cls_dropout"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the base weights; not given, as in the checkpoint"
    )
    quantization_config: dict[str, Any] | None = Field(
        None, description="transformers' own: load_in_4bit, load_in_8bit, …, or quant_method: torchao with a quant_type"
    )


class Recipe(Section):
    """One run. `data` and `metric` are those of its task, by sections.DATA and sections.METRICS."""

    task: Literal[
        "classification", "token-classification", "question-answering", "seq2seq", "causal-lm", "image-classification"
    ] = "classification"
    model: ModelSection
    data: SerializeAsAny[DataSection]
    method: dict[str, Any]
    training: dict[str, Any] = Field(default_factory=dict)
    metric: str | None = None
    seed: int = Field(0, ge=0, lt=2**32)  # the range of numpy's generators
    max_minutes: float | None = Field(None, gt=0)

    @field_validator("data", mode="before")
    @classmethod
    def _data_of_the_task(cls, value: Any, info: ValidationInfo) -> Any:
        # Without a task, which is an error by itself, nothing can be said about its data.
        return DATA[info.data["task"]].model_validate(value) if "task" in info.data else DataSection.model_construct()

    @field_validator("metric")
    @classmethod
    def _metric_of_the_task(cls, value: str | None, info: ValidationInfo) -> str | None:
        known = METRICS[info.data["task"]] if "task" in info.data else ()
        if value is not None and known and value not in known:
            raise ValueError(f"{info.data['task']} has no such metric; {did_you_mean(value, known)}")
        return value

    def dump(self) -> str:
        """YAML that `load_recipe` reads to an equal recipe."""
        return dump_yaml(self.model_dump())


def load_recipe(source: str, settings: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read a built-in recipe by name, or a YAML file by path; `settings` are `section.key=value` on top.

    Raises ConfigError for a source that is neither, YAML that is none, a key that does not exist, or a value
    of the wrong type; it names file and key path.
    """
    text = _read(source)
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold sections such as model, data and method; it holds {values!r:.60}.")
    for setting in settings:
        _apply(values, setting)
    if seed is not None:
        values["seed"] = seed
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e, values) for e in error.errors())) from error
    _refuse_unbracketed_lists(recipe.method)
    return recipe


def recipe_names() -> list[str]:
    """Names of the built-in recipes; those in folders have the folder in front, e.g. paper/cola-adalora."""
    return sorted(_names_in(resources.files(__package__) / "recipes", ""))


def _names_in(folder: Traversable, front: str) -> Iterator[str]:
    for file in folder.iterdir():
        if file.is_dir():
            yield from _names_in(file, f"{front}{file.name}/")
        elif file.name.endswith(".yaml"):
            yield front + file.name.removesuffix(".yaml")


def _read(source: str) -> str:
    if source in recipe_names():
        return (resources.files(__package__) / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    path = Path(source)
    if not is_file(path):
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
        if values.get(section) is None:  # also a section that is written, but empty
            values[section] = {}
        inner = values[section]
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {setting!r}: {section!r} is a value, not a section.")
        values = inner
    try:
        values[key] = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: the value is not valid YAML ({error}).") from error


def _refuse_unbracketed_lists(method: dict[str, Any]) -> None:
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = method.get(key)
        # A string is a regular expression; names with commas between them were meant as a list.
        if isinstance(value, str) and re.fullmatch(r"[\w.\- ]+(,[\w.\- ]*)+", value):
            names = ", ".join(part.strip() for part in value.split(",") if part.strip())
            raise ConfigError(
                f"method.{key} is {value!r}, which is one regular expression; for a list write [{names}]."
            )


def _explain(error: Any, values: dict[str, Any]) -> str:
    path, value = ".".join(str(part) for part in error["loc"]), error["input"]
    if error["type"] == "missing":
        return f"section {path} is missing" if path in _EXAMPLES else f"{path} is missing"
    if path in _EXAMPLES and error["type"] in ("model_type", "dict_type"):
        example = f"{path}.{_EXAMPLES[path]}={value if isinstance(value, str) else '…'}"
        return f"{path} is {value!r:.80}; it must be a section, e.g. {example}"
    if error["type"] == "value_error":
        return f"{path} is {value!r:.80}: {error['ctx']['error']}"
    if error["type"] != "extra_forbidden":
        return f"{path} is {value!r:.80}: {error['msg'].lower()}"
    section: Any = Recipe
    for part in error["loc"][:-1]:
        task = values.get("task", Recipe.model_fields["task"].default)
        section = DATA[task] if part == "data" else section.model_fields[part].annotation
    return f"there is no key {path!r}; " + did_you_mean(str(error["loc"][-1]), list(section.model_fields))
