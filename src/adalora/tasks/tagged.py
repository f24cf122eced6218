"""Words with a tag each: what rows must hold, which tags there are, and windows of tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..sections import TokensData

NO_LOSS = -100

OUTSIDE = "O"

SHOWN = 8  # tags in a description

ENTITY_TAG = re.compile("O|[BIES]-.+")

_BILOU_TAG = re.compile("[LU]-.+")

_WORD = re.compile(r"\w+|[^\w\s]")


def shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:SHOWN]) + (", …" if len(labels) > SHOWN else "")


def marks_entities(labels: Sequence[str]) -> bool:
    return all(ENTITY_TAG.fullmatch(label) for label in labels)


def check_rows(split: str, rows: Dataset, data: TokensData) -> None:
    """Raise DataError unless every row has a list of words and as many tags."""
    where = f"data.{split}"
    for number, (words, tags) in enumerate(zip(rows[data.tokens], rows[data.tags], strict=True)):
        for column, values in ((data.tokens, words), (data.tags, tags)):
            if not isinstance(values, list):
                raise DataError(
                    f"{where}: column {column!r} must hold lists, one entry for each word; row {number} holds "
                    f"{values!r:.60}. Such rows need jsonl or parquet."
                )
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise DataError(
                f"{where}: column {data.tokens!r} must hold words; row {number} holds {words!r:.60}. Correct or remove "
                "it."
            )
        if len(words) != len(tags):
            raise DataError(
                f"{where}: row {number} has {len(words)} words in column {data.tokens!r}, but {len(tags)} tags in "
                f"column {data.tags!r}. Correct or remove it."
            )
        if any(tag is None or (isinstance(tag, int) and tag < 0) for tag in tags):
            raise DataError(f"{where}: a tag is missing in row {number} of column {data.tags!r}. Correct or remove it.")


def tag_names(rows: Dataset, column: str) -> list[list[str]]:
    feature = getattr(rows.features[column], "feature", None)
    names = feature.names if isinstance(feature, ClassLabel) else None
    return [[names[tag] if names else str(tag) for tag in row] for row in rows[column]]


def rarest(tags: Sequence[Sequence[str]]) -> list[str]:
    """The rarest tag of each row: whoever has a row for each of these has every tag."""
    counts = Counter(tag for row in tags for tag in row)
    return [min(row, key=lambda tag: (counts[tag], tag)) for row in tags]


def check_labels(tags: Mapping[str, Sequence[Sequence[str]]], labels: Sequence[str], column: str) -> None:
    if len(labels) < 2:
        raise DataError(
            f"column {column!r} of data.train holds only the tag {labels[0]!r}; choose another with data.tags."
        )
    bilou = [label for label in labels if _BILOU_TAG.fullmatch(label)]
    if bilou and OUTSIDE in labels:
        raise DataError(f"column {column!r} holds the BILOU tag {bilou[0]!r}; write E- for L- and S- for U- (BIOES).")
    for split, rows in tags.items():
        for number, row in enumerate(rows):
            new = [tag for tag in row if tag not in labels]
            if new:
                raise DataError(
                    f"data.{split}: tag {new[0]!r} in column {column!r} (row {number}) does not occur in the training "
                    f"set, whose tags are {shown(labels)}. Correct it, or remove these rows."
                )


def encode(rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Any]]:
    """Windows of at most `max_length` tokens: `heads` are the first tokens of the `words` (indices) of `row`."""
    encoded = tokenizer(
        [list(row) for row in rows],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
    )
    columns: dict[str, list[Any]] = {name: encoded[name] for name in encoded if name in tokenizer.model_input_names}
    columns |= {"row": encoded["overflow_to_sample_mapping"], "heads": [], "words": []}
    columns["length"] = [len(ids) for ids in encoded["input_ids"]]
    last: dict[int, int] = {}  # word of each row whose first token has been met
    for window, row in enumerate(columns["row"]):
        heads, words = [], []
        for position, word in enumerate(encoded.word_ids(window)):
            if word is not None and word > last.get(row, -1):
                last[row] = word
                heads.append(position)
                words.append(word)
        columns["heads"].append(heads)
        columns["words"].append(words)
    return columns


def words_of(row: Mapping[str, Any], column: str, index: int) -> list[tuple[str, int, int]]:
    """(word, from, to) of a row, in characters of its text, or 0 and 0 where it comes in words."""
    words, text = row.get(column), row.get("text")
    if isinstance(words, Sequence) and not isinstance(words, str) and words:
        if all(isinstance(word, str) and word.strip() for word in words):
            return [(word, 0, 0) for word in words]
    elif words is None and isinstance(text, str) and text.strip():
        return [(found[0], found.start(), found.end()) for found in _WORD.finditer(text)]
    raise DataError(
        f"row {index} holds neither a list of words in {column!r} nor a text in 'text': {dict(row)!r:.80}. Give one."
    )
