"""What the training path asks of a task. Each family is one file with a class of this shape and a `build_task`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, Protocol

from datasets import DatasetDict
from torch import Tensor, nn
from transformers import Trainer

from ..recipe import Recipe
from ..sections import METRICS

_FAMILIES = {
    "classification": ("classification", "ClassificationTask"),
    "token-classification": ("tokens", "TokensTask"),
    "question-answering": ("questions", "QuestionsTask"),
    "seq2seq": ("pairs", "PairsTask"),
    "causal-lm": ("instructions", "InstructionsTask"),
    "image-classification": ("images", "ImagesTask"),
}
LOWER_IS_BETTER = ("loss", "perplexity")  # of all metrics


class Task(Protocol):
    """Data made ready for one model, and everything a run must know to train, score and use it."""

    splits: DatasetDict  # tokenized: train, validation and perhaps test
    labels: list[str]  # names of the classes; empty where there are none
    processor: Any  # tokenizer or image processor, saved beside the adapter
    metric: str  # the score that counts, a key of what `evaluate` returns
    task_type: ClassVar[str | None]  # PEFT's: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, SEQ_2_SEQ_LM, CAUSAL_LM; or None
    trainer_type: ClassVar[type[Trainer]]
    argument_options: ClassVar[Mapping[str, Any]]  # defaults for the training section, e.g. predict_with_generate

    @property
    def collator(self) -> Any:
        """Rows of a split → one padded batch."""

    @property
    def trainer_options(self) -> Mapping[str, Any]:
        """More keyword arguments for the Trainer, e.g. compute_metrics or preprocess_logits_for_metrics."""

    def describe(self) -> str:
        """In words, e.g. `2 classes (animal, plant); 64 train, 16 validation rows`."""

    def build_model(self, path: str, recipe: Recipe) -> nn.Module:
        """The pre-trained model at `path` with the head that the task needs. Raises ConfigError."""

    def evaluate(self, trainer: Trainer, split: str) -> dict[str, float]:
        """All metrics of the task on a split, computed over the whole of it."""

    def probe(self, model: nn.Module, split: str) -> tuple[dict[str, Tensor], str]:
        """(a batch of a few rows of the split on the model's device, name of the output to compare, e.g. logits)."""

    def predict(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One JSON-able answer for each row of raw columns (the label columns may be missing). Raises DataError."""


def build_task(path: str, recipe: Recipe) -> Task:
    """The recipe's task with its data for the model at `path`. Raises DataError, or ConfigError for the model."""
    task: Task = _module(recipe).build_task(path, recipe)
    return task


def build_processor_task(path: str, recipe: Recipe, labels: Sequence[str]) -> Task:
    """The same without data, for predicting with a trained adapter whose classes are `labels`."""
    task: Task = _module(recipe).without_data(path, recipe, list(labels))
    return task


def task_class(recipe: Recipe) -> type[Task]:
    """The class of the recipe's task: what holds for all its data and models."""
    kind: type[Task] = getattr(_module(recipe), _FAMILIES[recipe.task][1])
    return kind


def metric_without_data(recipe: Recipe) -> str | None:
    """The score that counts, as far as the recipe tells; None where it depends on the labels."""
    if recipe.metric is not None:
        return recipe.metric
    match recipe.task:
        case "classification":
            kind = getattr(recipe.data, "kind", None)
            return {"classes": "accuracy", "numbers": "pearson"}.get(str(kind))
        case "token-classification":
            return None
        case task:
            return METRICS[task][0]


def _module(recipe: Recipe) -> ModuleType:
    return importlib.import_module(f".{_FAMILIES[recipe.task][0]}", __package__)
