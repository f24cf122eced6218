"""Plain LoRA by PEFT, the baseline: uniform rank on the modules that AdaLoRA would adapt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from ..config import AdaLoraConfig
from ..conversion import adapter_type
from ..errors import ConfigError
from ..integrations.transformers import with_task_head
from ..recipe import did_you_mean
from ..targets import find_targets
from .base import ParameterCount

_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "exclude_modules": None,
    "modules_to_save": None,
    "parameters": None,
}


class Lora:
    """Options: r, lora_alpha, lora_dropout, target_modules, exclude_modules, modules_to_save, parameters.

    `parameters` fixes the size instead of r: the largest uniform rank that it allows, and what is left over
    as one more rank for single modules, spread over the depth. The scale stays lora_alpha / r for all.
    Raises ConfigError for an option that does not exist or cannot be meant.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        for key in options:
            if key not in _DEFAULTS:
                raise ConfigError(f"method lora has no option {key!r}; " + did_you_mean(key, list(_DEFAULTS)))
        self._options = _DEFAULTS | dict(options)
        _check(self._options)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap in a PeftModel."""
        choose = {k: self._options[k] for k in ("target_modules", "exclude_modules", "modules_to_save")}
        config = with_task_head(AdaLoraConfig(**choose), model)
        costs = {name: sum(_shape(module)) for name, module in find_targets(model, config).items()}
        ranks = self._ranks(costs)
        scale = self._options["lora_alpha"] / self._options["r"]
        least = min(ranks.values())
        more = {f"^{name}": rank for name, rank in ranks.items() if rank != least}
        lora = LoraConfig(
            r=least,
            lora_alpha=scale * least,
            lora_dropout=self._options["lora_dropout"],
            target_modules=list(costs),
            modules_to_save=list(config.modules_to_save or ()) or None,
            rank_pattern=more,
            alpha_pattern={name: scale * rank for name, rank in more.items()},
        )
        return get_peft_model(model, lora)

    def callbacks(self) -> list[TrainerCallback]:
        """None: LoRA does nothing while training."""
        return []

    def count(self, model: nn.Module) -> ParameterCount:
        """LoRA's size never changes."""
        adapter = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return ParameterCount(adapter, adapter, trained - adapter)

    def save(self, model: nn.Module, folder: Path, base: str, task_type: str | None) -> None:
        """As PEFT does."""
        model.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """For inference."""
        return PeftModel.from_pretrained(base, str(folder))

    def options(self) -> dict[str, Any]:
        """All options, defaults resolved."""
        return dict(self._options)

    def _ranks(self, costs: Mapping[str, int]) -> dict[str, int]:
        goal, whole = self._options["parameters"], sum(costs.values())
        if goal is None:
            return dict.fromkeys(costs, self._options["r"])
        rank, left = divmod(goal, whole)
        if not rank:
            raise ConfigError(f"parameters={goal} is below what rank 1 everywhere needs, {whole}.")
        ranks = dict.fromkeys(costs, rank)
        # Every seventh module in turn: one that is coprime to the usual six kinds visits all depths and kinds.
        names = list(costs)
        for name in sorted(names, key=lambda name: names.index(name) * 7 % len(names)):
            if costs[name] <= left:
                ranks[name] += 1
                left -= costs[name]
        return ranks


def _check(options: Mapping[str, Any]) -> None:
    alpha, dropout, parameters = (options[key] for key in ("lora_alpha", "lora_dropout", "parameters"))
    if not _is_count(options["r"]):
        raise ConfigError(f"r is {options['r']!r}; give a whole number of at least 1.")
    if not (_is_number(alpha) and 0 < alpha < math.inf):
        raise ConfigError(f"lora_alpha is {alpha!r}; give a number above 0.")
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise ConfigError(f"lora_dropout is {dropout!r}; give a number from 0 to below 1.")
    if not (parameters is None or _is_count(parameters)):
        raise ConfigError(f"parameters is {parameters!r}; give a whole number of at least 1, or leave it out for r.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _shape(module: nn.Module) -> tuple[int, int]:
    kind = adapter_type(type(module))
    assert kind is not None
    return kind.shape_of(module)
