"""Token classification: a tag for each word, and the entities that BIO or BIOES tags mark.

A word's tag stands at its first token; its other tokens and the special ones have no loss. A row that is too long
becomes several windows, so that no word goes without a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset, DatasetDict
from seqeval.metrics.sequence_labeling import get_entities
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
    Trainer,
)

from ..errors import ConfigError, DataError
from ..recipe import Recipe
from ..sections import TokensData
from .data import describe_rows, load_splits
from .ordered import OrderedTrainer, without_metrics
from .pretrained import load_model, load_tokenizer, require_known_tokens
from .scores import entity_scores, tag_accuracy
from .tagged import (
    ENTITY_TAG,
    NO_LOSS,
    OUTSIDE,
    check_labels,
    check_rows,
    encode,
    marks_entities,
    rarest,
    shown,
    tag_names,
    words_of,
)

BATCH = 32  # windows at once, in `predict`
PROBED = 8  # windows in a probe

_OURS = ("row", "heads", "words", "length", "labels")  # columns of windows that the model does not take


@dataclass
class TokensTask:
    """Windows of the rows, ready for a model, and the words and tags they came from."""

    splits: DatasetDict  # rows are windows
    tags: dict[str, list[list[str]]]  # of each split, each row, each word
    labels: list[str]
    processor: PreTrainedTokenizerBase
    metric: str
    data: TokensData
    task_type: ClassVar[str | None] = "TOKEN_CLS"
    trainer_type: ClassVar[type[Trainer]] = OrderedTrainer
    argument_options: ClassVar[Mapping[str, Any]] = {}

    @property
    def collator(self) -> DataCollatorForTokenClassification:
        """Pads each batch to its own longest window."""
        return DataCollatorForTokenClassification(self.processor)

    @property
    def trainer_options(self) -> Mapping[str, Any]:
        """Scores of the validation set at each evaluation."""
        return {
            "compute_metrics": lambda prediction: self._scores("validation", prediction.predictions),
            "preprocess_logits_for_metrics": lambda logits, _: _first(logits).argmax(-1),
        }

    @property
    def questions(self) -> Mapping[str, Sized]:
        """The rows that the windows were cut from, by the name that result.py asks for."""
        return self.tags

    def describe(self) -> str:
        """In words, e.g. `3 tags (B-PER, I-PER, O); 64 train, 16 validation rows (90 windows of 256 tokens)`."""
        windows = sum(len(rows) for rows in self.splits.values())
        rows = describe_rows(self.tags)
        size = f"{windows:,} windows of {self.data.max_length} tokens"
        return f"{len(self.labels)} tags ({shown(self.labels)}); {rows} ({size})"

    def build_model(self, path: str, recipe: Recipe) -> nn.Module:
        """The pre-trained model with a head for these tags; the head's start depends on the global seed.

        Raises ConfigError for a checkpoint that lacks weights, and for windows longer than the model can take.
        """
        return load_model(
            AutoModelForTokenClassification,
            path,
            recipe,
            self.processor,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={name: index for index, name in enumerate(self.labels)},
        )

    def evaluate(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Accuracy over all words and, with entities, their precision, recall and F1: type and both ends must fit."""
        with without_metrics(trainer):
            prediction = trainer.predict(self.splits[split], metric_key_prefix=split)
        return self._scores(split, prediction.predictions)

    def probe(self, model: nn.Module, split: str) -> tuple[dict[str, Tensor], str]:
        """The first windows of a split, without labels."""
        rows = self.splits[split].select(range(min(PROBED, len(self.splits[split]))))
        return self._batch(rows, next(model.parameters()).device), "logits"

    def predict(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """For each row its `tokens`, `tags`, `scores` (probabilities) and, with such tags, its `entities`.

        A row has the words themselves, or `text`, which is split into words and signs. An entity has its label, score
        (the mean over its words), text, and `words` from and to, the end left out; of a text also the characters
        `start` and `end`. Raises DataError.
        """
        places = [words_of(row, self.data.tokens, index) for index, row in enumerate(rows)]
        words = [[word for word, _, _ in found] for found in places]
        windows = Dataset.from_dict(encode(words, self.processor, self.data.max_length))
        tags = [[OUTSIDE if OUTSIDE in self.labels else self.labels[0]] * len(found) for found in words]
        scores = [[0.0] * len(found) for found in words]
        device = next(model.parameters()).device
        for begin in range(0, len(windows), BATCH):
            part = windows.select(range(begin, min(begin + BATCH, len(windows))))
            with torch.no_grad():
                shares = model(**self._batch(part, device)).logits.float().softmax(-1).cpu()  # (windows, tokens, tags)
            for window, share in zip(part, shares, strict=True):
                best = share.max(-1)
                for head, word in zip(window["heads"], window["words"], strict=True):
                    tags[window["row"]][word] = self.labels[int(best.indices[head])]
                    scores[window["row"]][word] = float(best.values[head])
        return [self._answer(*row) for row in zip(rows, places, tags, scores, strict=True)]

    def _answer(
        self,
        row: Mapping[str, Any],
        places: Sequence[tuple[str, int, int]],
        tags: list[str],
        scores: list[float],
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {"tokens": [word for word, _, _ in places], "tags": tags, "scores": scores}
        if not marks_entities(self.labels):
            return answer
        answer["entities"] = []
        for label, first, last in get_entities(tags):
            entity: dict[str, Any] = {
                "label": label,
                "score": sum(scores[first : last + 1]) / (last + 1 - first),
                "text": " ".join(word for word, _, _ in places[first : last + 1]),
                "words": [first, last + 1],
            }
            if row.get(self.data.tokens) is None:
                start, end = places[first][1], places[last][2]
                entity |= {"text": row["text"][start:end], "start": start, "end": end}
            answer["entities"].append(entity)
        return answer

    def _batch(self, windows: Dataset, device: torch.device) -> dict[str, Tensor]:
        columns = [name for name in windows.column_names if name not in _OURS]
        batch = self.processor.pad([{c: row[c] for c in columns} for row in windows], return_tensors="pt")
        return dict(batch.to(device))

    def _scores(self, split: str, guesses: Any) -> dict[str, float]:
        """`guesses` are tag indices (windows, tokens)."""
        truth = self.tags[split]
        # A word that the tokenizer drops, such as a control character, has no token to carry a prediction.
        found = [[OUTSIDE] * len(tags) for tags in truth]
        for window, guess in zip(self.splits[split], guesses, strict=True):
            for head, word in zip(window["heads"], window["words"], strict=True):
                found[window["row"]][word] = self.labels[int(guess[head])]
        scores = {"accuracy": tag_accuracy(found, truth)}
        return entity_scores(found, truth) | scores if marks_entities(self.labels) else scores


def build_task(path: str, recipe: Recipe) -> TokensTask:
    """Load and cut up the recipe's data for the model at `path`. Raises DataError, or ConfigError for the model."""
    data = _section(recipe)

    def check(split: str, rows: Dataset) -> list[str]:
        check_rows(split, rows, data)
        return rarest(tag_names(rows, data.tags))

    splits = load_splits(data, recipe.seed, ("tokens", "tags"), check)
    tags = {split: tag_names(rows, data.tags) for split, rows in splits.items()}
    seen = ["train"] if data.validation else ["train", "validation"]
    labels = sorted({tag for split in seen for row in tags[split] for tag in row})
    check_labels(tags, labels, data.tags)
    processor, metric = _load_tokenizer(path, recipe), _metric(recipe, labels)
    index = {name: number for number, name in enumerate(labels)}
    windows = DatasetDict()
    for split, rows in splits.items():
        encoded = encode(rows[data.tokens][:], processor, data.max_length)
        encoded["labels"] = [[NO_LOSS] * length for length in encoded["length"]]
        for place, row, heads, words in zip(
            encoded["labels"], encoded["row"], encoded["heads"], encoded["words"], strict=True
        ):
            for head, word in zip(heads, words, strict=True):
                place[head] = index[tags[split][row][word]]
        windows[split] = Dataset.from_dict(encoded)
    require_known_tokens(windows["train"], processor, recipe.model.name_or_path)
    return TokensTask(windows, tags, labels, processor, metric, data)


def without_data(path: str, recipe: Recipe, labels: list[str]) -> TokensTask:
    """The task for predicting alone. Raises ConfigError."""
    data, metric = _section(recipe), _metric(recipe, labels)
    return TokensTask(DatasetDict(), {}, labels, _load_tokenizer(path, recipe), metric, data)


def _section(recipe: Recipe) -> TokensData:
    assert isinstance(recipe.data, TokensData)  # by the recipe's own check
    return recipe.data


def _metric(recipe: Recipe, labels: Sequence[str]) -> str:
    if marks_entities(labels):
        return recipe.metric or "f1"
    if recipe.metric not in (None, "accuracy"):
        odd = next(label for label in labels if not ENTITY_TAG.fullmatch(label))
        raise DataError(
            f"metric is {recipe.metric!r}, which counts entities, but tag {odd!r} is none of BIO or BIOES (O, B-X, "
            "I-X, E-X, S-X). Use metric=accuracy, or rename the tags."
        )
    return "accuracy"


def _load_tokenizer(path: str, recipe: Recipe) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(path, recipe)
    if getattr(tokenizer, "add_prefix_space", None) is False:  # RoBERTa: else a word has other tokens than in a text
        tokenizer = load_tokenizer(path, recipe, add_prefix_space=True)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {recipe.model.name_or_path!r} ({type(tokenizer).__name__}) cannot tell which word a "
            "token belongs to. Token classification needs one with a tokenizer.json; choose a model that has it."
        )
    return tokenizer


def _first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple) else outputs
