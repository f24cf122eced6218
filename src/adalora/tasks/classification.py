"""Classification and regression of a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from ..errors import ConfigError, DataError
from ..recipe import DataSection, Recipe
from .data import load_splits


@dataclass
class ClassificationTask:
    """Tokenized splits, label names (none for regression), and what a Trainer needs to use them."""

    splits: DatasetDict
    labels: list[str]
    tokenizer: PreTrainedTokenizerBase
    metric: str

    @property
    def collator(self) -> DataCollatorWithPadding:
        """Pads each batch to its own longest row."""
        return DataCollatorWithPadding(self.tokenizer)

    def build_model(self, path: str, recipe: Recipe) -> nn.Module:
        """The pre-trained model with a head for these labels; the head's start depends on the global seed."""
        names = self.labels or ["score"]
        return _pretrained(
            AutoModelForSequenceClassification,
            path,
            recipe,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=None if self.labels else "regression",
        )

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """All metrics of the task from an EvalPrediction."""
        scores, truth = prediction.predictions, prediction.label_ids
        if not self.labels:
            guess = scores.reshape(-1)
            pearson = float(np.corrcoef(guess, truth)[0, 1])
            return {"pearson": pearson, "spearman": float(spearmanr(guess, truth).statistic)}
        guess = scores.argmax(-1)
        return {
            "accuracy": float(accuracy_score(truth, guess)),
            "macro_f1": float(f1_score(truth, guess, average="macro")),
            "matthews": float(matthews_corrcoef(truth, guess)),
        }

    def predict(self, model: nn.Module, texts: Sequence[str]) -> list[str]:
        """The label of each text, or its score."""
        with torch.no_grad():
            batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
            logits = model(**batch.to(next(model.parameters()).device)).logits.float().cpu()
        return [self.labels[i] for i in logits.argmax(-1)] if self.labels else [f"{x:.3f}" for x in logits.view(-1)]


def build_task(path: str, recipe: Recipe) -> ClassificationTask:
    """Load and tokenize the recipe's data for the model at `path`. Raises DataError."""
    splits = load_splits(recipe.data, recipe.seed)
    labels = _label_names(splits["train"], recipe.data.label)
    metric = recipe.metric or ("accuracy" if labels else "pearson")
    known = ("accuracy", "macro_f1", "matthews") if labels else ("pearson", "spearman")
    if metric not in known:
        kind = f"classes ({len(labels)})" if labels else "numbers"
        raise DataError(
            f"metric is {metric!r}, but column {recipe.data.label!r} holds {kind}; use {' or '.join(known)}."
        )
    tokenizer = _pretrained(AutoTokenizer, path, recipe)
    tokenized = DatasetDict({k: _tokenize(k, rows, recipe.data, labels, tokenizer) for k, rows in splits.items()})
    return ClassificationTask(tokenized, labels, tokenizer, metric)


def _pretrained(auto: Any, path: str, recipe: Recipe, **options: Any) -> Any:
    section = recipe.model
    try:
        return auto.from_pretrained(
            path, revision=section.revision, trust_remote_code=section.trust_remote_code, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model.name_or_path is {section.name_or_path!r}, which {auto.__name__} cannot load: {error} Give the "
            "folder or the hub name of a pre-trained base model."
        ) from error


def _label_names(rows: Dataset, column: str) -> list[str]:
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(rows[column])
    if None in values:
        raise DataError(f"column {column!r} has rows without a label.")
    if any(isinstance(value, float) for value in values):
        return []
    if len(values) < 2:
        raise DataError(f"column {column!r} holds only {values!r}; classification needs at least two labels.")
    return [str(value) for value in sorted(values)]


def _tokenize(
    split: str, rows: Dataset, data: DataSection, labels: list[str], tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    index = {name: number for number, name in enumerate(labels)}
    named = isinstance(rows.features[data.label], ClassLabel)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pair = [batch[data.text_pair]] if data.text_pair else []
        encoded: dict[str, Any] = dict(tokenizer(batch[data.text], *pair, truncation=True, max_length=data.max_length))
        encoded["labels"] = [_label(value, index, named, split, data.label) for value in batch[data.label]]
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        return encoded

    for column in (data.text, data.text_pair):
        if column and not all(isinstance(text, str) for text in rows[column]):
            raise DataError(f"data.{split}: column {column!r} must hold text in every row.")
    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc=None)


def _label(value: Any, index: dict[str, int], named: bool, split: str, column: str) -> float | int:
    if not index:
        return float(value)
    if named:
        return int(value)
    if str(value) not in index:
        raise DataError(f"data.{split}: label {value!r} in column {column!r} does not occur in the training set.")
    return index[str(value)]
