"""Trainers whose predictions stand in the order of the rows, so that a task can score them against its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainer, Trainer


class OrderedTrainer(Trainer):
    """Trainer, but grouping by length stays out of evaluation, where stock code lets it shuffle the rows."""

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # Over several processes accelerate cuts the sequence itself.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class OrderedSeq2SeqTrainer(OrderedTrainer, Seq2SeqTrainer):
    """The same for models that generate."""


@contextmanager
def without_metrics(trainer: Trainer) -> Iterator[None]:
    """Let `trainer` predict any split: its compute_metrics knows the rows of the validation set only."""
    kept, trainer.compute_metrics = trainer.compute_metrics, None
    try:
        yield
    finally:
        trainer.compute_metrics = kept
