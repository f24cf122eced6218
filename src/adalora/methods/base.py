"""What every method offers to the training path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import TrainerCallback


@dataclass(frozen=True)
class ParameterCount:
    """Trained parameters, counted from the tensors: of the adapter at its largest and at the end, of the head."""

    peak: int
    final: int
    head: int


class Method(Protocol):
    """A way to adapt a model; one file each."""

    @property
    def resumable(self) -> bool:
        """Whether a Trainer's checkpoint holds everything; else a run that was cut short starts again."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Adapt `model` (in place or wrapped) and choose what trains."""

    def callbacks(self) -> list[TrainerCallback]:
        """What the Trainer needs to run the method."""

    def added(self, model: nn.Module) -> list[nn.Parameter]:
        """What trains in a prepared model and is no weight of the base or of the head; weight decay leaves it out."""

    def count(self, model: nn.Module) -> ParameterCount:
        """Parameters of a prepared or trained model."""

    def save(self, model: nn.Module, folder: Path, base: str, task_type: str | None) -> None:
        """Write the adapter and what trained with it."""

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """Put a saved adapter into a fresh base model."""

    def options(self) -> dict[str, Any]:
        """What a recipe's `method` section needs to build an equal method."""
