"""The increment in SVD form with the regularizer, but without allocation: the paper's ablation SVD-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..checkpoint import load_adapter, save_adapter
from ..config import AdaLoraConfig
from ..errors import ConfigError
from ..grouping import factors
from ..injection import adapter_parameters, install, named_adapters
from ..integrations.saving import save_adapter_only
from .base import ParameterCount
from .lora import chosen
from .options import CHOICE, check_counts, check_lora, check_parameters, check_penalty, resolved
from .penalty import Factors, OrthogonalityCallback
from .ranks import spread

_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    **CHOICE,
    "parameters": None,
    "orth_reg_weight": 0.1,
    "orth_reg_form": "norm",
}


class SvdLora:
    """Equations 3 and 4 of arXiv 2303.10512 at a fixed rank. Options: those of lora, orth_reg_weight, orth_reg_form.

    A triplet costs in + out + 1. With `parameters`, ranks are spread as lora does; matrices may be left out then,
    since rank 1 everywhere may just not fit where LoRA's does. The scale is lora_alpha / r in any case.
    """

    resumable = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = resolved("svd-lora", _DEFAULTS, options)
        check_counts(self._options, "r")
        check_lora(self._options)
        check_parameters(self._options, "r")
        check_penalty(self._options)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Adapt in place, without a rank allocator."""
        given = self._options
        config, costs = chosen(model, given)
        ranks = dict.fromkeys(costs, given["r"])
        if given["parameters"] is not None:
            ranks = spread({name: cost + 1 for name, cost in costs.items()}, given["parameters"])
            ranks = {name: rank for name, rank in ranks.items() if rank}
        if not ranks:
            raise ConfigError(f"parameters={given['parameters']} is below one triplet, {min(costs.values()) + 1}.")
        most = max(ranks.values())
        own = AdaLoraConfig(
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            modules_to_save=config.modules_to_save,
            init_r=most,
            target_r=most,
            lora_alpha=given["lora_alpha"] / given["r"] * most,
            lora_dropout=given["lora_dropout"],
            orth_reg_weight=given["orth_reg_weight"],
            orth_reg_form=given["orth_reg_form"],
        )
        install(model, own, ranks)
        save_adapter_only(model)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """The one that adds the regularizer's gradient."""
        return [OrthogonalityCallback(_factors, self._options["orth_reg_weight"], self._options["orth_reg_form"])]

    def added(self, model: nn.Module) -> list[nn.Parameter]:
        """A, E and B."""
        return factors(model)

    def count(self, model: nn.Module) -> ParameterCount:
        """A, B and Λ; the size never changes."""
        adapter = sum(p.numel() for m in _adapters(model) for p in (m.lora_A, m.lora_E, m.lora_B))
        trained = sum(parameter.numel() for parameter in adapter_parameters(model))
        return ParameterCount(adapter, adapter, trained - adapter)

    def save(self, model: nn.Module, folder: Path, base: str, task_type: str | None) -> None:
        """As a PEFT AdaLoRA folder."""
        save_adapter(model, folder, base_model_name_or_path=base, task_type=task_type)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """For inference."""
        return load_adapter(base, folder)

    def options(self) -> dict[str, Any]:
        """All options, defaults resolved."""
        return dict(self._options)


def _adapters(model: nn.Module) -> list[Any]:
    return [module for _, module in named_adapters(model)]


def _factors(model: nn.Module) -> Factors:
    return [(module.lora_A, module.lora_B) for module in _adapters(model)]
