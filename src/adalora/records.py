"""What a run tells while it lasts: a line on the screen, and one JSON line for each record in its folder."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import TrainerCallback

from .files import write_files
from .integrations.transformers import AdaLoraCallback
from .recipe import Recipe

logger = logging.getLogger("adalora")


class RunRecorder(TrainerCallback):
    """Appends every log of the Trainer to metrics.jsonl and every allocation to ranks.jsonl.

    Stands behind `source`, whose allocator exists once training has begun, in the list of callbacks. The
    folder is made then, with the recipe in it: what is wrong with a schedule has shown itself before.
    """

    def __init__(self, folder: Path, recipe: Recipe, source: AdaLoraCallback | None) -> None:
        self.folder, self.recipe, self.source = folder, recipe, source
        self.live: list[tuple[int, int]] = []  # (step, live triplets) after each allocation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the folder, and listen to the allocator."""
        text = self.recipe.dump()
        write_files(self.folder, {"recipe.yaml": lambda path: path.write_text(text, encoding="utf-8")})
        if self.source is not None and self.source.allocator is not None:
            self.source.allocator.on_allocate.append(self._on_allocate)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line for each log."""
        self._append("metrics.jsonl", {"step": state.global_step, **(logs or {})})

    def _on_allocate(self, step: int, budget: int, keep: Mapping[str, Tensor]) -> None:
        ranks = {name: int(mask.sum()) for name, mask in keep.items()}
        self.live.append((step, sum(ranks.values())))
        self._append("ranks.jsonl", {"step": step, "budget": budget, "ranks": ranks})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class ProgressLine(TrainerCallback):
    """Loss, learning rate, phase, budget and time left: one live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, source: AdaLoraCallback | None, label: str) -> None:
        self.console, self.source, self.label = console, source, label
        self.text, self.started, self.shown = "", 0.0, 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task(label, total=None, text="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the line."""
        self.started = time.monotonic()
        if self.console.is_terminal:
            self.bar.update(self.task, total=state.max_steps)
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
            left = spent / max(state.global_step, 1) * (state.max_steps - state.global_step)
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


class StopGracefully(TrainerCallback):
    """Ctrl-C or a time limit ends training after the current step, so that the budget is met and all is saved.

    A second Ctrl-C interrupts at once. `reason` says why training stopped, if it did.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.max_seconds = None if max_minutes is None else 60 * max_minutes
        self.reason: str | None = None
        self.started = 0.0
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over SIGINT, which only the main thread may."""
        self.started = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if there is a reason."""
        if self.max_seconds is not None and time.monotonic() - self.started > self.max_seconds:
            self.reason = self.reason or f"max_minutes={self.max_seconds / 60:g} are over"
        if self.reason and not control.should_training_stop:
            logger.warning("%s: training ends after step %d of %d", self.reason, state.global_step, state.max_steps)
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give SIGINT back."""
        self.restore()

    def restore(self) -> None:
        """Give SIGINT back; also needed when training ends by an error."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _on_interrupt(self, number: int, frame: Any) -> None:
        self.reason = "interrupted"
        self.restore()


def _is_score(key: str) -> bool:
    return not key.endswith(("_loss", "_runtime", "_per_second")) and key != "eval_model_preparation_time"
