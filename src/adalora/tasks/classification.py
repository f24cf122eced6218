"""Classification and regression of a text or a pair of texts, with the metrics of GLUE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
)

from ..errors import DataError
from ..integrations.models import task_head
from ..recipe import Recipe
from ..sections import ClassificationData
from .data import describe_rows, load_splits, require_texts
from .labels import are_numbers, encode_labels, label_names, read_labels
from .ordered import without_metrics
from .pretrained import load_model, load_tokenizer, require_known_tokens
from .scores import class_scores, number_scores

SHOWN = 8  # names of classes in a description
PROBED = 8  # rows of a probe

_NUMBERS = ("pearson", "spearman", "mean_pearson_spearman")
_TWO_CLASSES = ("f1", "mean_accuracy_f1")
_CLASSES = ("accuracy", "macro_f1", "matthews")


@dataclass
class ClassificationTask:
    """Tokenized splits, label names (none for regression), and what a Trainer needs to use them."""

    splits: DatasetDict
    labels: list[str]
    processor: PreTrainedTokenizerBase
    metric: str
    data: ClassificationData

    task_type: ClassVar[str | None] = "SEQ_CLS"
    trainer_type: ClassVar[type[Trainer]] = Trainer
    argument_options: ClassVar[Mapping[str, Any]] = {}

    def describe(self) -> str:
        """In words, e.g. `2 classes (animal, plant); 64 train, 16 validation rows`."""
        names = ", ".join(self.labels[:SHOWN]) + (", …" if len(self.labels) > SHOWN else "")
        what = f"{len(self.labels)} classes ({names})" if self.labels else "regression"
        return f"{what}; {describe_rows(self.splits)}"

    @property
    def collator(self) -> DataCollatorWithPadding:
        """Pads each batch to its own longest row."""
        return DataCollatorWithPadding(self.processor)

    @property
    def trainer_options(self) -> Mapping[str, Any]:
        """Metrics at each evaluation."""
        return {"compute_metrics": self.compute_metrics}

    def build_model(self, path: str, recipe: Recipe) -> nn.Module:
        """The pre-trained model with a head for these labels; the head's start depends on the global seed.

        Raises ConfigError for a checkpoint that lacks weights, and for texts longer than the model can take.
        """
        names = self.labels or ["score"]
        model = load_model(
            AutoModelForSequenceClassification,
            path,
            recipe,
            self.processor,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=None if self.labels else "regression",
        )
        if not self.labels and "train" in self.splits:
            _start_at(model, float(np.mean(self.splits["train"]["labels"])))
        return model

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """All metrics of the task from an EvalPrediction."""
        scores, truth = prediction.predictions, prediction.label_ids
        if isinstance(scores, tuple):  # BART and T5 also give hidden states
            scores = scores[0]
        if not self.labels:
            return number_scores(scores.reshape(-1), truth)
        return class_scores(scores.argmax(-1), truth, len(self.labels))

    def evaluate(self, trainer: Trainer, split: str) -> dict[str, float]:
        """All metrics on a split."""
        with without_metrics(trainer):  # once is enough
            return self.compute_metrics(trainer.predict(self.splits[split], metric_key_prefix=split))

    def probe(self, model: nn.Module, split: str) -> tuple[dict[str, Tensor], str]:
        """The first rows of a split as a batch on the model's device."""
        rows = self.splits[split].select(range(min(PROBED, len(self.splits[split]))))
        columns = [name for name in rows.column_names if name not in ("labels", "length")]
        batch = self.processor.pad([{c: row[c] for c in columns} for row in rows], return_tensors="pt")
        return dict(batch.to(next(model.parameters()).device)), "logits"

    def predict(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """For each row {"label", "score", "scores": {label: probability}}, or {"value"} of a regression."""
        if not rows:
            return []
        texts = Dataset.from_list([{c: row.get(c) for c in _text_columns(self.data)} for row in rows])
        require_texts(texts, _text_columns(self.data), "the input")
        with torch.no_grad():
            batch = self.processor.pad(_encode(texts[:], self.data, self.processor), return_tensors="pt")
            logits = model(**batch.to(next(model.parameters()).device)).logits.float().cpu()  # (rows, classes)
        if not self.labels:
            return [{"value": value} for value in logits.view(-1).tolist()]
        answers = []
        for shares in logits.softmax(-1).tolist():
            best = max(range(len(shares)), key=shares.__getitem__)
            scores = dict(zip(self.labels, shares, strict=True))
            answers.append({"label": self.labels[best], "score": shares[best], "scores": scores})
        return answers


def build_task(path: str, recipe: Recipe) -> ClassificationTask:
    """Load and tokenize the recipe's data for the model at `path`. Raises DataError, or ConfigError for the model."""
    data = _section(recipe)

    def check(split: str, rows: Dataset) -> list[Any] | None:
        require_texts(rows, _text_columns(data), f"data.{split}")
        values = read_labels(split, rows, data.label)
        return None if are_numbers(values, data.kind) else values

    splits = load_splits(data, recipe.seed, ("text", "text_pair", "label"), check)
    # Rows that were held out belong to the training set: they may have the only row of a class.
    seen = ["train"] if data.validation else ["train", "validation"]
    values = [value for split in seen for value in read_labels(split, splits[split], data.label)]
    labels = label_names(values, data.kind, data.label, splits["train"].features[data.label])
    metric = _metric(recipe, labels)
    encoded = {split: encode_labels(split, rows, data.label, labels) for split, rows in splits.items()}
    tokenizer = load_tokenizer(path, recipe)
    tokenized = {split: _tokenize(rows, data, tokenizer) for split, rows in splits.items()}
    require_known_tokens(tokenized["train"], tokenizer, recipe.model.name_or_path)
    whole = DatasetDict({split: rows.add_column("labels", encoded[split]) for split, rows in tokenized.items()})
    return ClassificationTask(whole, labels, tokenizer, metric, data)


def without_data(path: str, recipe: Recipe, labels: list[str]) -> ClassificationTask:
    """The task for predicting alone; no `labels` for a regression. Raises ConfigError."""
    return ClassificationTask(
        DatasetDict(), labels, load_tokenizer(path, recipe), _metric(recipe, labels), _section(recipe)
    )


def _section(recipe: Recipe) -> ClassificationData:
    assert isinstance(recipe.data, ClassificationData)  # by the recipe's own check
    return recipe.data


def _start_at(model: nn.Module, mean: float) -> None:
    """Let a new head of a regression answer `mean` on average.

    From 0, all matrices first learn the offset, which is the largest part of the loss and which any change of the
    features can serve: on STS-B the loss could stay at the variance of the labels for good.
    """
    head = [module for name in task_head(model) for module in model.get_submodule(name).modules()]
    for module in head:
        # A bias of exactly 0 is new: one that was trained has some other value.
        if isinstance(module, nn.Linear) and module.out_features == 1 and module.bias is not None:
            with torch.no_grad():
                module.bias.copy_(torch.where(module.bias == 0, mean, module.bias))


def _text_columns(data: ClassificationData) -> list[str]:
    return [data.text] + ([data.text_pair] if data.text_pair else [])


def _metric(recipe: Recipe, labels: Sequence[str]) -> str:
    known = (*_CLASSES, *(_TWO_CLASSES if len(labels) == 2 else ())) if labels else _NUMBERS
    metric = recipe.metric or known[0]
    if metric not in known:
        kind = f"classes ({len(labels)})" if labels else "numbers"
        column = _section(recipe).label
        raise DataError(f"metric is {metric!r}, but column {column!r} holds {kind}; use {' or '.join(known)}.")
    return metric


def _tokenize(rows: Dataset, data: ClassificationData, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        encoded = _encode(batch, data, tokenizer)
        return encoded | {"length": [len(ids) for ids in encoded["input_ids"]]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc=None)


def _encode(
    batch: Mapping[str, Any], data: ClassificationData, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    texts = [batch[column] for column in _text_columns(data)]
    return dict(tokenizer(*texts, truncation=True, max_length=data.max_length))
