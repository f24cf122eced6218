"""A folder on the disk → the trained model and its task, for the commands that use one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import AdapterFileError, ConfigError
from ..jsonfiles import believed, read_object
from ..methods import build_method
from ..methods.base import Method
from ..reading import CONFIG_FILE
from ..recipe import Recipe, load_recipe
from ..resolve import resolve_model
from ..tasks.base import Task, build_processor_task
from .defaults import recipe_of

_TASKS = {
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "seq2seq",
    "CAUSAL_LM": "causal-lm",
}
_TRUST = "model.trust_remote_code"
_METHODS = {"ADALORA": "adalora", "LORA": "lora"}


@dataclass(frozen=True)
class Trained:
    """An adapter and what is known about it: its recipe, its classes, where its base model is."""

    adapter: Path
    recipe: Recipe
    labels: list[str]
    path: str  # to load the base model from
    base: str  # its name, for files
    method: Method

    def task(self) -> Task:
        """Its task, without data."""
        return build_processor_task(self.path, self.recipe, self.labels)

    def model(self, task: Task) -> nn.Module:
        """The base model with the adapter in it, in evaluation mode, on the accelerator if there is one."""
        import torch
        from transformers import set_seed

        set_seed(self.recipe.seed)  # a head that the adapter does not hold starts as it did in the run
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return self.method.load(task.build_model(self.path, self.recipe), self.adapter).to(device).eval()


def read_trained(folder: Path, model: str | None = None, settings: Sequence[str] = ()) -> Trained:
    """A run's folder, or an adapter's alone; the base model is `model`, or what the files say.

    `settings` change the recipe, or what stands for it where there is none.

    Raises AdapterFileError for a folder that is neither, ConfigError where the task cannot be told.
    """
    with believed(folder):
        return _read_trained(folder, model, settings)


def _read_trained(folder: Path, model: str | None, settings: Sequence[str]) -> Trained:
    adapter = adapter_folder(folder)
    config = read_object(adapter / CONFIG_FILE) if (adapter / CONFIG_FILE).is_file() else {}
    run = adapter.parent if (adapter.parent / "recipe.yaml").is_file() and adapter.name == "adapter" else None
    recipe = load_recipe(str(run / "recipe.yaml"), settings) if run else _recipe_of(adapter, config, model, settings)
    if recipe.model.trust_remote_code and not any(text.partition("=")[0].strip() == _TRUST for text in settings):
        raise ConfigError(
            f"the recipe in {str(folder)!r} would run code that comes with {recipe.model.name_or_path!r}. A folder "
            f"cannot allow that by itself: if you trust both, add --set {_TRUST}=true."
        )
    known = run is not None and (run / "result.json").is_file()
    labels = read_object(run / "result.json")["labels"] if run and known else _labels(adapter, recipe.task)
    if model:
        section = recipe.model.model_copy(update={"name_or_path": model, "hub_id": None})
        recipe = recipe.model_copy(update={"model": section})
    path, base = resolve_model(recipe)
    return Trained(adapter, recipe, labels, path, base, build_method(recipe.method))


def adapter_folder(folder: Path) -> Path:
    """The adapter in a run's folder, or the folder itself. Raises AdapterFileError."""
    for place in (folder / "adapter", folder):
        if (place / CONFIG_FILE).is_file():
            return place
    if (folder / "recipe.yaml").is_file() and (folder / "adapter" / "config.json").is_file():
        return folder / "adapter"  # of full fine-tuning: a whole model
    failed = folder / "FAILED.txt"
    why = f" The run there failed: {failed.read_text(encoding='utf-8').strip()}" if failed.is_file() else ""
    state = "holds no adapter" if folder.is_dir() else "is no folder"
    raise AdapterFileError(
        f"{str(folder)!r} {state}; give the folder of a finished run, or one with {CONFIG_FILE}.{why}"
    )


def _labels(adapter: Path, task: str) -> list[str]:
    """Names of the classes as the base model's configuration beside the adapter has them."""
    if not task.endswith("classification"):
        return []
    if not (adapter / "config.json").is_file():
        raise ConfigError(
            f"{str(adapter)!r} does not say which classes it knows: config.json of the model that it was trained in is "
            "missing. Put it there, or give the folder of the run."
        )
    config = read_object(adapter / "config.json")
    if config.get("problem_type") == "regression":
        return []
    return [
        str(name)
        for _, name in sorted(
            config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}).items(), key=lambda item: int(item[0])
        )
    ]


def _recipe_of(adapter: Path, config: dict[str, Any], model: str | None, settings: Sequence[str]) -> Recipe:
    """What an adapter without a run says about itself; the data section is the task's default."""
    kind, task = config.get("peft_type"), _TASKS.get(str(config.get("task_type")))
    if kind not in _METHODS:
        raise AdapterFileError(f"{str(adapter)!r} is a {kind!r} adapter; known are {', '.join(_METHODS)}.")
    if task is None:
        raise ConfigError(
            f"{str(adapter / CONFIG_FILE)!r} says task_type={config.get('task_type')!r}, so that its task is unknown; "
            "give the folder of the run, which has a recipe."
        )
    base = model or config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{str(adapter / CONFIG_FILE)!r} does not say which model it was made for; give --model.")
    values = {"task": task, "model": {"name_or_path": base}, "data": {}, "method": {"name": _METHODS[kind]}}
    return recipe_of(values, settings)
