"""Questions and long contexts → windows that a model can take, with where each token stands and the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from ..sections import QuestionsData

# Columns of a window that are not the model's; `_encoder` says what they hold.
OURS = ("row", "null", "starts", "ends", "length", "start_positions", "end_positions")


def make_windows(rows: Dataset, data: QuestionsData, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """One row for each window, those of one question behind one another; rows[data.answers] may be missing.

    Raises DataError for a context that the tokenizer makes nothing of.
    """
    return rows.map(
        _encoder(data, tokenizer), with_indices=True, batched=True, remove_columns=rows.column_names, desc=None
    )


def require_usable(tokenizer: PreTrainedTokenizerBase, data: QuestionsData, name: str) -> None:
    """Raise ConfigError for a tokenizer with which answers cannot be found, and for a stride that leads nowhere."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {name!r} ({type(tokenizer).__name__}) cannot say which characters a token stands for, "
            "which answers are found by. Choose a model with a fast tokenizer (a tokenizer.json)."
        )
    if tokenizer.padding_side != "right":
        raise ConfigError(
            f"the tokenizer of {name!r} pads on the {tokenizer.padding_side}, where positions of answers would move. "
            "Set padding_side to 'right' in its tokenizer_config.json, or choose an encoder such as BERT."
        )
    if data.no_answer and tokenizer.cls_token_id not in tokenizer("a", "b")["input_ids"]:
        raise ConfigError(
            f"data.no_answer is true, but the tokenizer of {name!r} puts no CLS token before a text, on which `no "
            "answer` is predicted. Choose an encoder such as BERT, or set data.no_answer=false."
        )
    if data.stride + tokenizer.num_special_tokens_to_add(pair=True) >= data.max_length:
        raise ConfigError(
            f"data.stride is {data.stride}, which leaves nothing new in windows of data.max_length={data.max_length} "
            "tokens. Set data.stride to at most half of data.max_length."
        )


def require_answers(split: str, rows: Dataset, data: QuestionsData) -> None:
    """Raise DataError unless every answer stands in its context where it says, and each question has one if it must."""
    for i, (context, answers) in enumerate(zip(rows[data.context], rows[data.answers], strict=True)):
        where = f"data.{split}, row {i}: column {data.answers!r}"
        texts, starts = (answers.get(key) if isinstance(answers, Mapping) else None for key in ("text", "answer_start"))
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(
                f"{where} is {answers!r:.80}; it must hold {{'text': [...], 'answer_start': [...]}} with a start for "
                "each text."
            )
        if not texts and not data.no_answer:
            raise DataError(
                f"{where} holds no answer. Remove such rows, or set data.no_answer=true, as for SQuAD v2.0."
            )
        for text, start in zip(texts, starts, strict=True):
            there = context[start : start + len(text)] if start >= 0 else ""
            if there != text:
                raise DataError(
                    f"{where} says that {text!r:.60} begins at character {start} of the context, where {there!r:.60} "
                    "stands. Correct answer_start; it counts characters from 0."
                )


def require_short_questions(where: str, rows: Dataset, data: QuestionsData, tokenizer: Any) -> None:
    """Raise DataError for a question beside which no window moves on.

    A window needs room for one token of the context more than it shares with the window before.
    """
    room = data.max_length - tokenizer.num_special_tokens_to_add(pair=True) - data.stride
    ids = tokenizer([text.strip() for text in rows[data.question]], add_special_tokens=False)["input_ids"]
    for i, question in enumerate(ids):
        if len(question) >= room:
            raise DataError(
                f"{where}, row {i}: the question has {len(question)} tokens, which leaves no room for the context: "
                f"data.max_length={data.max_length} less data.stride={data.stride} and special tokens is {room}. Raise "
                "data.max_length, lower data.stride, or shorten the question."
            )


def _encoder(data: QuestionsData, tokenizer: Any) -> Callable[[dict[str, list[Any]], list[int]], dict[str, Any]]:
    """Questions and contexts → windows: the model's inputs, `row` of the question, where each token stands
    (`starts`, `ends`, -1 outside the context), `null`, the position that means no answer, and the labels."""

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        encoded = tokenizer(
            [text.strip() for text in batch[data.question]],  # thousands of blanks would leave no room
            batch[data.context],
            truncation="only_second",
            max_length=data.max_length,
            stride=data.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        columns: dict[str, Any] = dict(encoded) | {name: [] for name in OURS}
        for i, (source, characters) in enumerate(zip(sources, offsets, strict=True)):
            context, ids = batch[data.context][source], encoded["input_ids"][i]
            starts, ends = _characters(context, characters, encoded.sequence_ids(i))
            null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            answers = batch[data.answers][source] if data.answers in batch else {"text": [], "answer_start": []}
            first, last = _label(answers, starts, ends) or (null, null)
            for name, value in zip(OURS, (indices[source], null, starts, ends, len(ids), first, last), strict=True):
                columns[name].append(value)
        _require_tokens(columns, indices, batch[data.context])
        return columns

    return encode


def _require_tokens(columns: Mapping[str, Any], indices: Sequence[int], contexts: Sequence[str]) -> None:
    seen = {row for row, starts in zip(columns["row"], columns["starts"], strict=True) if max(starts) >= 0}
    for row, context in zip(indices, contexts, strict=True):
        if row not in seen:
            raise DataError(f"the context {context!r:.60} gives no tokens. Remove its rows.")


def _characters(context: str, offsets: Sequence[tuple[int, int]], parts: Sequence[int | None]) -> tuple[Any, Any]:
    """(start, end) of each token in the context without blanks at its edges, -1 for all that is not of the context."""
    starts, ends = [], []
    for (start, end), part in zip(offsets, parts, strict=True):
        text = context[start:end] if part == 1 else ""
        word = text.strip()
        start += len(text) - len(text.lstrip())
        starts.append(start if word else -1)
        ends.append(start + len(word) if word else -1)
    return starts, ends


def _label(answers: Mapping[str, Any], starts: Sequence[int], ends: Sequence[int]) -> tuple[int, int] | None:
    """(first, last token) of the first answer; None unless the window holds it whole."""
    inside = [i for i, start in enumerate(starts) if start >= 0]
    if not answers["text"] or not inside:
        return None
    text: str = answers["text"][0]
    begin = answers["answer_start"][0] + len(text) - len(text.lstrip())
    end = begin + len(text.strip())
    held = [i for i in inside if ends[i] > begin and starts[i] < end]
    whole = starts[inside[0]] <= begin and end <= ends[inside[-1]]
    return (held[0], held[-1]) if held and whole else None
