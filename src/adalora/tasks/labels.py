"""Labels of a split: present in every row, of one kind, and as numbers that a head can be trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from ..errors import DataError

_TYPES = (bool, int, float, str)


def read_labels(split: str, rows: Dataset, column: str) -> list[Any]:
    """The labels of a split; of a ClassLabel column, their names. Raises DataError, naming the first bad row."""
    feature, values = rows.features[column], rows[column][:]
    named = isinstance(feature, ClassLabel)
    # A hub's test set without labels has -1 in a ClassLabel column; an empty cell of a CSV file gives NaN.
    missing = [i for i, v in enumerate(values) if v is None or (v < 0 if named else v != v)]
    if missing:
        remedy = " or leave data.test out" if split == "test" else ""
        raise DataError(
            f"data.{split}: the label is missing (column {column!r}) in {len(missing)} of {len(values)} rows, first in "
            f"row {missing[0]}. Remove these rows{remedy}."
        )
    if named:
        return [feature.names[value] for value in values]
    _require_one_type(split, values, column)
    return values


def are_numbers(values: Sequence[Any], kind: str | None) -> bool:
    """Whether labels make a regression: `kind` is "classes", "numbers", or None: then numbers with a point do."""
    return kind == "numbers" or (kind is None and any(isinstance(value, float) for value in values))


def label_names(values: Sequence[Any], kind: str | None, column: str, feature: Any) -> list[str]:
    """Names of the classes in the training labels, in order; none for regression. Raises DataError."""
    if are_numbers(values, kind):
        return []
    names = list(feature.names) if isinstance(feature, ClassLabel) else [_name(value) for value in sorted(set(values))]
    if len(names) < 2:
        raise DataError(
            f"column {column!r} of data.train holds only the label {', '.join(names)!r}; classification needs at "
            "least two labels. Choose another column with data.label, or give rows of another class."
        )
    return names


def encode_labels(split: str, rows: Dataset, column: str, names: Sequence[str]) -> list[int] | list[float]:
    """Indices into `names`, or numbers where there are none. Raises DataError, naming the first bad row."""
    values = read_labels(split, rows, column)
    if not names:
        bad = [i for i, v in enumerate(values) if isinstance(v, bool | str) or not math.isfinite(v)]
        if bad:
            raise DataError(
                f"data.{split}: {_which(values, bad, column)} is no finite number, but this is a regression. "
                "Correct the labels, or set data.kind=classes."
            )
        return [float(value) for value in values]
    index = {name: number for number, name in enumerate(names)}
    texts = [_name(value) for value in values]
    bad = [i for i, text in enumerate(texts) if text not in index]
    if bad:
        raise DataError(
            f"data.{split}: {_which(values, bad, column)} does not occur in the training set, whose labels are "
            f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}. Correct the labels, or remove these rows."
        )
    return [index[text] for text in texts]


def _require_one_type(split: str, values: Sequence[Any], column: str) -> None:
    odd = [i for i, value in enumerate(values) if type(value) not in _TYPES]
    if odd:
        raise DataError(
            f"data.{split}: {_which(values, odd, column)} is a {type(values[odd[0]]).__name__}; a label must be one "
            "text, number or true/false. Choose another column with data.label."
        )
    kind = _kind(values[0])
    other = [i for i, value in enumerate(values) if _kind(value) != kind]
    if other:
        raise DataError(
            f"data.{split}: column {column!r} mixes labels of different types: {values[0]!r} in row 0, "
            f"{values[other[0]]!r} in row {other[0]} ({len(other)} rows differ from row 0). Write all in one way."
        )


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)  # JSON has 1 and 1.5 in one column of numbers


def _which(values: Sequence[Any], bad: Sequence[int], column: str) -> str:
    return f"label {values[bad[0]]!r:.60} in column {column!r} (row {bad[0]}; {len(bad)} of {len(values)} rows)"


def _name(value: Any) -> str:
    # So that 1 in one file is the class of 1.0 in another.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
