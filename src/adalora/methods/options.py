"""Checking what a recipe's `method` section gives, for the methods that have no configuration class of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import AdaLoraConfig
from ..errors import ConfigError, InjectionError, did_you_mean
from ..integrations.models import with_task_head
from ..targets import matches

# Which modules, for every method that adapts matrices.
CHOICE: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": None, "modules_to_save": None}


def resolved(method: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`. Raises ConfigError for an option that does not exist."""
    for key in given:
        if key not in defaults:
            raise ConfigError(f"method {method} has no option {key!r}; " + did_you_mean(str(key), list(defaults)))
    return {**defaults, **given}


def check_counts(options: Mapping[str, Any], *names: str) -> None:
    """Raise ConfigError unless these are whole numbers of at least 1."""
    for name in names:
        if not is_count(options[name]):
            raise ConfigError(f"{name} is {options[name]!r}; give a whole number of at least 1.")


def check_parameters(options: Mapping[str, Any], instead: str) -> None:
    """Raise ConfigError unless `parameters` is a whole number of at least 1, or left out for `instead`."""
    value = options["parameters"]
    if not (value is None or is_count(value)):
        raise ConfigError(f"parameters is {value!r}; give a whole number of at least 1, or leave it out for {instead}.")


def check_lora(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a `lora_alpha` or `lora_dropout` that cannot be meant."""
    alpha, dropout = options["lora_alpha"], options["lora_dropout"]
    if not (is_number(alpha) and 0 < alpha < math.inf):
        raise ConfigError(f"lora_alpha is {alpha!r}; give a number above 0.")
    if not (is_number(dropout) and 0 <= dropout < 1):
        raise ConfigError(f"lora_dropout is {dropout!r}; give a number from 0 to below 1.")


def check_penalty(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a regularizer that cannot be meant."""
    weight, form = options["orth_reg_weight"], options["orth_reg_form"]
    if not (is_number(weight) and 0 <= weight < math.inf):
        raise ConfigError(f"orth_reg_weight is {weight!r}; give a number of at least 0.")
    if form not in ("norm", "squared"):
        raise ConfigError(f"orth_reg_form is {form!r}; choose norm or squared.")


def with_head(model: nn.Module, config: AdaLoraConfig) -> AdaLoraConfig:
    """`config` with what trains whole: its `modules_to_save`, by default the task head.

    Raises InjectionError for a name that no module has.
    """
    for pattern in config.modules_to_save or ():
        if not any(matches(name, [pattern]) for name, _ in model.named_modules()):
            raise InjectionError(f"modules_to_save names {pattern!r}, but {type(model).__name__} has no such module.")
    return with_task_head(config, model)


def is_number(value: Any) -> bool:
    """Whether `value` is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
