"""The best checkpoint and early stopping, for a method whose early checkpoints are over its budget."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from ..errors import ConfigError
from .transformers import AdaLoraCallback


class BestWithinBudget(TrainerCallback):
    """Lets `load_best_model_at_end` choose among checkpoints of the final phase only.

    For any Trainer: `callbacks=[source, BestWithinBudget(source)]`, in front of an EarlyStoppingCallback, whose
    patience then counts from the final phase on. Without a `source` (of a method without a budget) it only checks
    that the metric to choose by is one that is computed, and raises ConfigError if not.
    """

    def __init__(self, source: AdaLoraCallback | None) -> None:
        self.source = source

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what the last evaluation chose."""
        self._forget(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        """Have this evaluation count as the first one."""
        self._forget(state)
        wanted = args.metric_for_best_model
        if wanted is None:
            return
        key = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
        names = [name.removeprefix("eval_") for name in metrics if name.startswith("eval_")]
        if key not in metrics:
            raise ConfigError(
                f"'training.metric_for_best_model' is {wanted!r}, which is not computed while training; there are "
                f"{', '.join(names)}."
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training may end right behind a checkpoint."""
        self._forget(state)

    def _forget(self, state: Any) -> None:
        allocator = self.source.allocator if self.source else None
        if allocator is not None and not allocator.frozen:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None


class Patience(EarlyStoppingCallback):
    """transformers' early stopping, which says that it was the one, and which a resumed run continues."""

    def __init__(self, early_stopping_patience: int, early_stopping_threshold: float = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.reason: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the count, which the Trainer stores, but by default does not restore."""
        super().on_train_begin(args, state, control, **kwargs)
        stored = state.stateful_callbacks.get(type(self).__name__) or {}
        if state.global_step and isinstance(stored, dict):
            self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        """Count, and say why if it is enough."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        count = self.early_stopping_patience_counter
        if count >= self.early_stopping_patience:
            self.reason = f"{args.metric_for_best_model} was no better in {count} evaluations"
