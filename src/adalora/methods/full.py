"""Full fine-tuning: every parameter trains, and the folder holds the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..errors import AdapterFileError, InjectionError
from ..stored import check_finite
from .base import ParameterCount
from .options import resolved
from .trained import head_modules, trained_count


class Full:
    """No options. What it trains outside the head counts as its adapter."""

    resumable = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        resolved("full", {}, options)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Train everything."""
        if not isinstance(model, PreTrainedModel):
            raise InjectionError(f"method full stores transformers models only, not a {type(model).__name__}.")
        return model.requires_grad_(True)

    def callbacks(self) -> list[TrainerCallback]:
        """None."""
        return []

    def added(self, model: nn.Module) -> list[nn.Parameter]:
        """Nothing: weights of the base model train."""
        return []

    def count(self, model: nn.Module) -> ParameterCount:
        """The size never changes."""
        own, head = trained_count(model, head_modules(model))
        return ParameterCount(own, own, head)

    def save(self, model: nn.Module, folder: Path, base: str, task_type: str | None) -> None:
        """As transformers does: AutoModel….from_pretrained(folder) reads it."""
        check_finite(model.state_dict())
        model.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """A new model of the class and configuration of `base`, for inference."""
        whole: Any = base
        try:
            model = type(whole).from_pretrained(
                str(folder), config=whole.config, dtype=whole.dtype, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise AdapterFileError(f"cannot read the model in {str(folder)!r}: {error}") from error
        return model.to(whole.device).eval().requires_grad_(False)

    def options(self) -> dict[str, Any]:
        """None."""
        return {}
