"""Extractive question answering: the span of a context that answers a question, or that there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer

from ..errors import DataError
from ..recipe import Recipe
from ..sections import QuestionsData
from .data import describe_rows, load_splits, require_texts
from .ordered import OrderedTrainer, without_metrics
from .pretrained import load_model, load_tokenizer, require_known_tokens
from .spans import Span, best_spans, no_answer_probability, probability, window_spans
from .squad import score_v1, score_v2
from .windows import OURS, make_windows, require_answers, require_short_questions, require_usable

BATCH = 32  # windows at once, in `predict`
PROBED = 8  # windows in a probe


@dataclass(frozen=True)
class Found:
    """What a model says of one question: its best spans, and the score of `no answer`."""

    spans: list[Span]
    null: float

    @property
    def no_answer(self) -> float:
        """Probability that there is no answer, against the best span."""
        return no_answer_probability(self.null, self.spans[0].score)


@dataclass
class QuestionsTask:
    """Windows of the contexts, ready for a model, and the questions they came from."""

    splits: DatasetDict  # rows are windows
    questions: DatasetDict  # rows are questions
    processor: PreTrainedTokenizerBase
    metric: str
    data: QuestionsData
    labels: list[str] = field(default_factory=list)
    task_type: ClassVar[str | None] = "QUESTION_ANS"
    trainer_type: ClassVar[type[Trainer]] = OrderedTrainer
    argument_options: ClassVar[Mapping[str, Any]] = {}

    @property
    def collator(self) -> DataCollatorWithPadding:
        """Pads each batch to its own longest window."""
        return DataCollatorWithPadding(self.processor)

    @property
    def trainer_options(self) -> Mapping[str, Any]:
        """Scores of the validation set at each evaluation."""
        return {
            "compute_metrics": lambda prediction: self._scores("validation", prediction.predictions),
            # Encoder-decoders also give hidden states, which nobody should collect.
            "preprocess_logits_for_metrics": lambda logits, _: logits[:2],
        }

    def describe(self) -> str:
        """In words, e.g. `spans that answer questions; 64 train, 16 validation rows (90 windows of 384 tokens)`."""
        windows = sum(len(rows) for rows in self.splits.values())
        what = "spans that answer questions, or none" if self.data.no_answer else "spans that answer questions"
        return f"{what}; {describe_rows(self.questions)} ({windows:,} windows of {self.data.max_length} tokens)"

    def build_model(self, path: str, recipe: Recipe) -> nn.Module:
        """The pre-trained model with a new head for starts and ends, which depends on the global seed.

        Raises ConfigError for a checkpoint that lacks weights, and for windows longer than the model can take.
        """
        return load_model(AutoModelForQuestionAnswering, path, recipe, self.processor)

    def evaluate(self, trainer: Trainer, split: str) -> dict[str, float]:
        """SQuAD's scores in percent: `exact_match` and `f1`, and where questions may have no answer those of v2.0.

        There `exact_match` and `f1` are at equal scores of `no answer` and of the best span, which is threshold 0.5
        of the probability; `best_f1` is at the threshold that is best on this very split.
        """
        with without_metrics(trainer):
            prediction = trainer.predict(self.splits[split], metric_key_prefix=split)
        return self._scores(split, prediction.predictions)

    def probe(self, model: nn.Module, split: str) -> tuple[dict[str, Tensor], str]:
        """The first windows of a split, without labels."""
        rows = self.splits[split].select(range(min(PROBED, len(self.splits[split]))))
        return self._batch(rows, next(model.parameters()).device), "start_logits"

    def predict(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """For each question: id (None if it has none), answer, score, start, end, no_answer_probability.

        `start` and `end` are characters of the context; `score` is the probability of the answer among the n best.
        No answer is the answer "" without start and end; where all questions have one, its probability is None.
        Raises DataError.
        """
        if not rows:
            return []
        windows = make_windows(self._asked(rows), self.data, self.processor)
        found = self._found(windows, *self._logits(model, windows))
        return [self._answer(row, item) for row, item in zip(rows, found, strict=True)]

    def _asked(self, rows: Sequence[Mapping[str, Any]]) -> Dataset:
        names = (self.data.question, self.data.context)
        for i, row in enumerate(rows):
            for name in names:
                if not isinstance(row.get(name), str):
                    raise DataError(f"row {i}: {name!r} is {row.get(name)!r:.60}; it must hold text.")
        asked = Dataset.from_list([{name: row[name] for name in names} for row in rows])
        require_texts(asked, [self.data.context], "rows")
        require_short_questions("rows", asked, self.data, self.processor)
        return asked

    def _logits(self, model: nn.Module, windows: Dataset) -> tuple[list[Any], list[Any]]:
        """(start, end) logits of each window, the padding behind them as it came."""
        device, starts, ends = next(model.parameters()).device, [], []
        model.eval()
        with torch.no_grad():
            for begin in range(0, len(windows), BATCH):
                rows = windows.select(range(begin, min(begin + BATCH, len(windows))))
                output = model(**self._batch(rows, device))
                starts += list(output.start_logits.float().cpu().numpy())
                ends += list(output.end_logits.float().cpu().numpy())
        return starts, ends

    def _answer(self, row: Mapping[str, Any], found: Found) -> dict[str, Any]:
        best, scores = found.spans[0], [span.score for span in found.spans]
        if self.data.no_answer:
            scores.append(found.null)
        none = self.data.no_answer and found.no_answer > 0.5
        return {
            "id": row.get(self.data.id),
            "answer": "" if none else row[self.data.context][best.start : best.end],
            "score": probability(found.null if none else best.score, scores),
            "start": None if none else best.start,
            "end": None if none else best.end,
            "no_answer_probability": found.no_answer if self.data.no_answer else None,
        }

    def _scores(self, split: str, logits: Any) -> dict[str, float]:
        rows = self.questions[split]
        found = self._found(self.splits[split], logits[0], logits[1])
        spans = [item.spans[0] for item in found]
        guesses = [text[s.start : s.end] for text, s in zip(rows[self.data.context], spans, strict=True)]
        golds = [answers["text"] for answers in rows[self.data.answers]]
        if not self.data.no_answer:
            return score_v1(guesses, golds)
        scores = score_v2(guesses, golds, [item.no_answer for item in found], threshold=0.5)
        renamed = {key.replace("exact", "exact_match"): value for key, value in scores.items()}
        return {key: value for key, value in renamed.items() if not key.endswith("total")}

    def _found(self, windows: Dataset, start_logits: Sequence[Any], end_logits: Sequence[Any]) -> list[Found]:
        """One for each question, in the order of the windows."""
        spans: dict[int, list[list[Span]]] = {}
        nulls: dict[int, float] = {}
        windows = windows.select_columns(["row", "null", "starts", "ends"])
        for window, first, last in zip(windows, start_logits, end_logits, strict=True):
            row, null = window["row"], window["null"]
            best = window_spans(
                first, last, window["starts"], window["ends"], self.data.n_best, self.data.max_answer_length
            )
            spans.setdefault(row, []).append(best)
            # There is no answer only if no window has one, so the window least sure of that speaks for all.
            nulls[row] = min(nulls.get(row, np.inf), float(first[null]) + float(last[null]))
        return [Found(best_spans(parts, self.data.n_best), nulls[row]) for row, parts in spans.items()]

    def _batch(self, rows: Dataset, device: torch.device) -> dict[str, Tensor]:
        columns = [name for name in rows.column_names if name not in OURS]
        return dict(self.collator([{name: row[name] for name in columns} for row in rows]).to(device))


def build_task(path: str, recipe: Recipe) -> QuestionsTask:
    """Load the recipe's data and cut it into windows. Raises DataError, or ConfigError for model and tokenizer."""
    empty = without_data(path, recipe, [])
    data, tokenizer = empty.data, empty.processor

    def check(split: str, rows: Dataset) -> None:
        require_texts(rows, [data.context], f"data.{split}")
        require_texts(rows, [data.context, data.question], f"data.{split}")
        require_answers(split, rows, data)
        require_short_questions(f"data.{split}", rows, data, tokenizer)

    questions = load_splits(data, recipe.seed, ("question", "context", "answers"), check)
    splits = DatasetDict({split: make_windows(rows, data, tokenizer) for split, rows in questions.items()})
    require_known_tokens(splits["train"], tokenizer, recipe.model.name_or_path)
    return QuestionsTask(splits, questions, tokenizer, empty.metric, data)


def without_data(path: str, recipe: Recipe, labels: list[str]) -> QuestionsTask:
    """The task for predicting only; there are no labels."""
    data = recipe.data
    assert isinstance(data, QuestionsData)
    tokenizer = load_tokenizer(path, recipe)
    require_usable(tokenizer, data, recipe.model.name_or_path)
    return QuestionsTask(DatasetDict(), DatasetDict(), tokenizer, recipe.metric or "f1", data, labels)
