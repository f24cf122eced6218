"""What a run shows while it lasts: one line of our own, and none of other libraries."""

from __future__ import annotations

import time
import warnings
from typing import Any

from datasets import disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from .integrations.transformers import AdaLoraCallback

_ROOM_FOR_A_BAR = 90  # columns


def quiet() -> None:
    """Leave the screen to our own line: no bars, and no report that a new head is new."""
    # PEFT 0.21 asks transformers 5.23 by an old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


class ProgressLine(TrainerCallback):
    """Loss, learning rate, phase, budget and time left: one live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, source: AdaLoraCallback | None, label: str) -> None:
        self.console, self.source, self.label = console, source, label
        self.text, self.started, self.first, self.shown = "", 0.0, 0, 0.0
        columns = [
            TextColumn("{task.description}"),
            *([BarColumn(bar_width=24)] if console.width >= _ROOM_FOR_A_BAR else []),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[text]}"),
        ]
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task(label, total=None, text="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the line."""
        self.started, self.first = time.monotonic(), state.global_step
        if self.console.is_terminal:
            self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        if self.console.is_terminal:
            self.bar.update(self.task, completed=state.global_step, text=self._text())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take loss and rate; without a terminal, print them, a dozen times a run."""
        logs = logs or {}
        if "loss" in logs:
            self.text = f"loss {float(logs['loss']):.3f}  lr {float(logs.get('learning_rate', 0)):.1e}"
        scores = {key[5:]: value for key, value in logs.items() if key.startswith("eval_") and _is_score(key)}
        if scores:
            shown = "  ".join(f"{name} {float(value):.3f}" for name, value in scores.items())
            self.console.print(f"  {self.label} epoch {state.epoch:.1f}: {shown}")
        elif not self.console.is_terminal and "loss" in logs and self._due(state):
            spent = time.monotonic() - self.started
            left = spent / max(state.global_step - self.first, 1) * (state.max_steps - state.global_step)
            line = f"  {self.label} {state.global_step}/{state.max_steps} {self._text()}  {left:.0f} s left"
            self.console.print(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the line away."""
        self.close()

    def close(self) -> None:
        """Take the line away; also needed when training ends by an error."""
        if self.bar.live.is_started:  # stopping one that never started prints an empty line
            self.bar.stop()

    def _due(self, state: Any) -> bool:
        done = state.global_step / max(state.max_steps, 1)
        if done - self.shown < 1 / 12 and done < 1:
            return False
        self.shown = done
        return True

    def _text(self) -> str:
        allocator = self.source.allocator if self.source else None
        if allocator is None:
            return self.text
        whole = allocator.schedule.target_budget
        return f"{self.text}  {allocator.phase.value}  budget {allocator.budget} → {whole}"


def _is_score(key: str) -> bool:
    return not key.endswith(("_loss", "_runtime", "_per_second")) and key != "eval_model_preparation_time"
