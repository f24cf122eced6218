"""AdaLoRA, by this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..checkpoint import load_adapter, save_adapter
from ..config import AdaLoraConfig
from ..grouping import factors
from ..injection import adapter_parameters, inject
from ..integrations.models import with_task_head
from ..integrations.saving import save_adapter_only
from ..integrations.transformers import AdaLoraCallback
from ..report import rank_report
from .base import ParameterCount


class AdaLora:
    """Options are the fields of AdaLoraConfig."""

    resumable = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.config = AdaLoraConfig.from_dict(options)
        self.callback = AdaLoraCallback()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Adapt in place; the task head trains unless `modules_to_save` says otherwise."""
        inject(model, with_task_head(self.config, model))
        save_adapter_only(model)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """The one that runs the rank allocator."""
        return [self.callback]

    def added(self, model: nn.Module) -> list[nn.Parameter]:
        """A, E and B."""
        return factors(model)

    def count(self, model: nn.Module) -> ParameterCount:
        """`final` counts live triplets, `peak` all that were allocated."""
        report = rank_report(model)
        trained = sum(parameter.numel() for parameter in adapter_parameters(model))
        return ParameterCount(report.capacity_parameters, report.parameters, trained - report.capacity_parameters)

    def save(self, model: nn.Module, folder: Path, base: str, task_type: str | None) -> None:
        """As a PEFT AdaLoRA folder."""
        save_adapter(model, folder, base_model_name_or_path=base, task_type=task_type)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """For inference."""
        return load_adapter(base, folder)

    def options(self) -> dict[str, Any]:
        """All fields, defaults resolved."""
        return self.config.to_dict()
