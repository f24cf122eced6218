"""Classification and regression of a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..errors import DataError
from ..recipe import DataSection, Recipe
from .data import load_splits
from .labels import encode_labels, label_names, read_labels
from .pretrained import load_classifier, load_tokenizer, require_known_tokens

SHOWN = 8  # names of classes in a description


@dataclass
class ClassificationTask:
    """Tokenized splits, label names (none for regression), and what a Trainer needs to use them."""

    splits: DatasetDict
    labels: list[str]
    tokenizer: PreTrainedTokenizerBase
    metric: str
    max_length: int

    def describe(self) -> str:
        """In words, e.g. `2 classes (animal, plant); 64 train, 16 validation rows`."""
        names = ", ".join(self.labels[:SHOWN]) + (", …" if len(self.labels) > SHOWN else "")
        what = f"{len(self.labels)} classes ({names})" if self.labels else "regression"
        return f"{what}; {', '.join(f'{len(rows):,} {split}' for split, rows in self.splits.items())} rows"

    @property
    def collator(self) -> DataCollatorWithPadding:
        """Pads each batch to its own longest row."""
        return DataCollatorWithPadding(self.tokenizer)

    def build_model(self, path: str, recipe: Recipe) -> nn.Module:
        """The pre-trained model with a head for these labels; the head's start depends on the global seed.

        Raises ConfigError for a checkpoint that lacks weights, and for texts longer than the model can take.
        """
        names = self.labels or ["score"]
        return load_classifier(
            path,
            recipe,
            self.tokenizer,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=None if self.labels else "regression",
        )

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """All metrics of the task from an EvalPrediction."""
        scores, truth = prediction.predictions, prediction.label_ids
        if isinstance(scores, tuple):  # BART and T5 also give hidden states
            scores = scores[0]
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
            batch = self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            logits = model(**batch.to(next(model.parameters()).device)).logits.float().cpu()
        return [self.labels[i] for i in logits.argmax(-1)] if self.labels else [f"{x:.3f}" for x in logits.view(-1)]


def build_task(path: str, recipe: Recipe) -> ClassificationTask:
    """Load and tokenize the recipe's data for the model at `path`. Raises DataError, or ConfigError for the model."""
    data = recipe.data
    splits = load_splits(data, recipe.seed)
    # Rows that were held out belong to the training set: they may have the only row of a class.
    seen = ["train"] if data.validation else ["train", "validation"]
    values = [value for split in seen for value in read_labels(split, splits[split], data.label)]
    labels = label_names(values, data, splits["train"].features[data.label])
    metric = recipe.metric or ("accuracy" if labels else "pearson")
    known = ("accuracy", "macro_f1", "matthews") if labels else ("pearson", "spearman")
    if metric not in known:
        kind = f"classes ({len(labels)})" if labels else "numbers"
        raise DataError(f"metric is {metric!r}, but column {data.label!r} holds {kind}; use {' or '.join(known)}.")
    encoded = {split: encode_labels(split, rows, data, labels) for split, rows in splits.items()}
    tokenizer = load_tokenizer(path, recipe)
    tokenized = {split: _tokenize(rows, data, tokenizer) for split, rows in splits.items()}
    require_known_tokens(tokenized["train"], tokenizer, recipe.model.name_or_path)
    whole = DatasetDict({split: rows.add_column("labels", encoded[split]) for split, rows in tokenized.items()})
    return ClassificationTask(whole, labels, tokenizer, metric, data.max_length)


def _tokenize(rows: Dataset, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pair = [batch[data.text_pair]] if data.text_pair else []
        encoded: dict[str, Any] = dict(tokenizer(batch[data.text], *pair, truncation=True, max_length=data.max_length))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        return encoded

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc=None)
