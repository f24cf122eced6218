"""Ending a training early in good order: after the current step, with the budget met and everything saved."""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger("adalora")

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class StopGracefully(TrainerCallback):
    """Ctrl-C, SIGTERM or a time limit ends training after the current step; what follows it still runs.

    For any Trainer: `Trainer(..., callbacks=[AdaLoraCallback(config), StopGracefully(max_minutes=30)])`. The
    budget is met and the Trainer returns as if it were done, so that the lines behind `trainer.train()` save
    the model. A second signal ends the process at once. `reason` says why training stopped: "interrupted",
    "terminated", or that the minutes are over; None if it ran to its end.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.max_seconds = None if max_minutes is None else 60 * max_minutes
        self.reason: str | None = None
        self.started = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals, which only the main thread may."""
        self.started, self.reason = time.monotonic(), None
        if threading.current_thread() is threading.main_thread():
            self.restore()
            self._before = {number: signal.signal(number, self._on_signal) for number in REASONS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if there is a reason."""
        if self.max_seconds is not None and time.monotonic() - self.started > self.max_seconds:
            self.reason = self.reason or f"max_minutes={self.max_seconds / 60:g} are over"
        if self.reason and not control.should_training_stop:
            logger.warning("%s: training ends after step %d of %d", self.reason, state.global_step, state.max_steps)
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        self.restore()

    def restore(self) -> None:
        """Give the signals back; also needed when training ends by an error."""
        while self._before:
            number, handler = self._before.popitem()
            # None stands for a handler that was not set from Python and that Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.reason = REASONS[signal.Signals(number)]
        self.restore()
