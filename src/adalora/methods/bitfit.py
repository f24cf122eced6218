"""BitFit: the biases of the base model and the task head train, nothing else (arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..config import AdaLoraConfig
from ..errors import InjectionError
from .base import ParameterCount
from .options import resolved
from .trained import head_modules, put_in, read_trained, train_only, trained_count, write_trained


class BitFit:
    """Option: modules_to_save, by default the task head. A bias is a vector whose own name ends in `bias`."""

    resumable = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = resolved("bitfit", {"modules_to_save": None}, options)
        AdaLoraConfig(modules_to_save=self._options["modules_to_save"])  # it checks it

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze all but biases and head, in place."""
        heads = head_modules(model, self._options["modules_to_save"])
        names = {n for n, p in model.named_parameters() if n.endswith("bias") and p.ndim == 1}
        if not any(not name.startswith(tuple(f"{head}." for head in heads)) for name in names):
            raise InjectionError(
                f"{type(model).__name__} has no biases outside its head, so BitFit has nothing to train."
            )
        train_only(model, names, heads)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """None."""
        return []

    def added(self, model: nn.Module) -> list[nn.Parameter]:
        """Nothing: biases of the base model train."""
        return []

    def count(self, model: nn.Module) -> ParameterCount:
        """The size never changes."""
        own, head = trained_count(model, self._heads(model))
        return ParameterCount(own, own, head)

    def save(self, model: nn.Module, folder: Path, base: str, task_type: str | None) -> None:
        """What trained."""
        facts = {"base_model_name_or_path": base, "task_type": task_type}
        write_trained(model, folder, "bitfit", self._heads(model), facts)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """For inference."""
        return put_in(base, read_trained(folder, "bitfit"), folder)

    def options(self) -> dict[str, Any]:
        """All options, defaults resolved."""
        return dict(self._options)

    def _heads(self, model: nn.Module) -> list[str]:
        return head_modules(model, self._options["modules_to_save"])
