"""Rows to predict: from the command line, a file or a pipe."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..recipe import Recipe

Row = dict[str, Any]


def rows_of_lines(lines: Iterable[str], recipe: Recipe, where: str) -> Iterator[Row]:
    """One row for each line that is not blank: a JSON object is a row, anything else the task's input text."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _row(line.rstrip("\n"), recipe, f"{where}, line {number}")


def rows_of_file(file: Path, recipe: Recipe) -> Iterator[Row]:
    """Rows of a .jsonl, .json (a list), .csv, .tsv or .txt file. Raises DataError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(file)!r}: {getattr(error, 'strerror', None) or error}.") from error
    match file.suffix.lower():
        case ".txt":
            yield from (
                _named(line, recipe, f"{file}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line
            )
        case ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    yield _object(line, f"{file}, line {number}")
        case ".json":
            yield from _list(text, file)
        case ".csv":
            yield from _table(text, file)
        case ".tsv":
            yield from _table(text, file, delimiter="\t", quoting=csv.QUOTE_NONE)
        case suffix:
            raise DataError(
                f"--file is {str(file)!r}; readable are .jsonl, .json, .csv, .tsv and .txt, not {suffix!r}."
            )


def _table(text: str, file: Path, **form: Any) -> Iterator[Row]:
    try:
        yield from csv.DictReader(text.splitlines(keepends=True), **form)
    except csv.Error as error:
        raise DataError(f"{str(file)!r} is no table of texts: {error}.") from error


def batches(rows: Iterable[Row], size: int) -> Iterator[Sequence[Row]]:
    """Lists of at most `size` rows."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _row(text: str, recipe: Recipe, where: str) -> Row:
    return _object(text, where) if text.lstrip().startswith("{") else _named(text, recipe, where)


def _object(text: str, where: str) -> Row:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}): {text:.60}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} must be a JSON object, a row; it is {text:.60}")
    return value


def _list(text: str, file: Path) -> list[Row]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{str(file)!r} is not valid JSON ({error}); for one object in each line call it .jsonl."
        ) from error
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{str(file)!r} must hold a list of objects, the rows.")
    return value


def _named(text: str, recipe: Recipe, where: str) -> Row:
    """A plain text as a row. Raises DataError for a task that needs more than one column."""
    data: Any = recipe.data
    match recipe.task:
        case "classification" if data.text_pair is None:
            return {data.text: text}
        case "token-classification":
            return {data.tokens: text.split()}
        case "seq2seq":
            return {data.source: text}
        case "image-classification":
            return {data.image: text}
        case "causal-lm" if data.kind == "messages":
            return {data.messages: [{"role": "user", "content": text}]}
        case "causal-lm":
            return {data.text if data.kind == "text" else data.prompt: text}
        case "question-answering":
            columns = [data.question, data.context]
        case _:
            columns = [data.text, data.text_pair]
    example = json.dumps(dict.fromkeys(columns, "…"), ensure_ascii=False)
    raise DataError(f"{where}: {text!r:.60} is one text, but a row here has {' and '.join(columns)}; give {example}.")
