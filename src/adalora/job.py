"""A run that is ready to begin: everything that training, scoring and recording it need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import nn
from transformers import Trainer

from .integrations.best import Patience
from .integrations.stopping import StopGracefully
from .integrations.transformers import AdaLoraCallback
from .methods.base import Method
from .recipe import Recipe
from .records import RunRecorder
from .screen import ProgressLine
from .tasks.base import Task


@dataclass
class Job:
    """Its parts; `source` is the callback of AdaLoRA, None for another method, and `path` where its base lies."""

    recipe: Recipe
    out: Path
    console: Console
    method: Method
    source: AdaLoraCallback | None
    task: Task
    path: str
    base: str
    model: nn.Module
    recorder: RunRecorder
    stop: StopGracefully
    line: ProgressLine
    patience: Patience | None
    checkpoint: Path | None
    trainer: Trainer

    @property
    def stopped(self) -> str | None:
        """Why the run ended before its last step."""
        return self.stop.reason or (self.patience.reason if self.patience else None)
