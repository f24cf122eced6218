"""Rows from the hub or from local files, by `datasets`, with every mistake in a recipe explained."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..errors import DataError
from ..files import is_file
from ..sections import DataSection
from .foreign import one_line, silenced

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

# Only an empty cell is missing: pandas would also take None, NA and null for that, which are words.
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
# A quote in a TSV file is a character of the text; read as in CSV, an odd one would swallow rows.
_TSV = _CSV | {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
_OPTIONS = {".csv": _CSV, ".tsv": _TSV}

HELD_OUT = 0.1  # of the training set, where a recipe has no validation set
SPLITS = ("train", "validation", "test")


def load_splits(
    data: DataSection,
    seed: int,
    columns: Sequence[str] = (),
    check: Callable[[str, Dataset], Sequence[Any] | None] | None = None,
) -> DatasetDict:
    """The splits train, validation and, if there is one, test, each in the order of its file.

    `columns` are the keys of `data` that name columns; those that are None are left out. `check` is given each
    split's name and its rows, whole and in the order of the file. It raises what is wrong with them, and returns the
    class of each row, or None where rows have no classes. Only then a validation set is held out, and `*_rows` are
    drawn from the splits; see `draw`. Raises DataError.
    """
    wanted = {name: getattr(data, name) for name in SPLITS if getattr(data, name)}
    splits = _from_hub(data, wanted) if data.name else DatasetDict({k: _from_file(k, v) for k, v in wanted.items()})
    named = {key: getattr(data, key) for key in columns if getattr(data, key) is not None}
    classes: dict[str, Sequence[Any]] = {}
    for name, rows in splits.items():
        if not len(rows):
            raise DataError(f"data.{name} ({wanted[name]!r}) has no rows.")
        require_columns(rows, named, f"data.{name}")
        classes[name] = (check(name, rows) if check else None) or [None] * len(rows)
    if "validation" not in splits:
        train, held_out = _held_out(len(splits["train"]), seed)
        for name, chosen in (("validation", held_out), ("train", train)):
            classes[name] = [classes["train"][i] for i in chosen]
            splits[name] = splits["train"].select(chosen)
    for name in SPLITS:
        limit = getattr(data, f"{name}_rows")
        if name in splits and limit is not None:
            if name == "train":
                _require_a_row_each(limit, classes[name])
            splits[name] = splits[name].select(draw(classes[name], limit, seed))
    return DatasetDict({name: splits[name] for name in SPLITS if name in splits})


def draw(classes: Sequence[Any], count: int, seed: int) -> list[int]:
    """Indices of `count` rows drawn by `seed`, each class in its share and, if there is room, with one row at least.

    In ascending order; all of them where there are no more than `count`. With the same seed, a larger count adds rows
    and takes none away.
    """
    sizes, met = Counter(classes), Counter[Any]()
    ranked = []
    for place, index in enumerate(np.random.default_rng(seed).permutation(len(classes)).tolist()):
        name = classes[index]
        # The first row of each class comes first; the rest of it is spread evenly over the whole ranking.
        ranked.append((met[name] > 0, (met[name] + 0.5) / sizes[name], place, index))
        met[name] += 1
    return sorted(index for *_, index in sorted(ranked)[:count])


def describe_rows(splits: Mapping[str, Sized]) -> str:
    """In words, e.g. `64 train, 16 validation rows`."""
    return ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()) + " rows"


def require_columns(rows: Dataset, named: Mapping[str, str], where: str) -> None:
    """Raise DataError unless `rows` has the column that each key of section data names."""
    missing = {key: column for key, column in named.items() if column not in rows.column_names}
    for key, column in missing.items():
        raise DataError(
            f"{where} has no column {column!r}, which data.{key} names; its columns are "
            f"{', '.join(rows.column_names)}. Name yours with data.{key}."
        )


def require_texts(rows: Dataset, columns: Sequence[str], where: str) -> None:
    """Raise DataError unless all `columns` hold texts, of which at least one in each row is not blank."""
    for column in columns:
        bad = [i for i, text in enumerate(rows[column]) if not isinstance(text, str)]
        if bad:
            raise DataError(
                f"{where}: column {column!r} must hold text in every row; {len(bad)} of {len(rows)} rows do not, the "
                f"first is row {bad[0]} ({rows[bad[0]][column]!r:.60}). Remove these rows, or choose another column."
            )
    blank = [i for i, texts in enumerate(zip(*(rows[c] for c in columns), strict=True)) if not "".join(texts).strip()]
    if blank:
        raise DataError(
            f"{where}: column {columns[0]!r} is empty in {len(blank)} of {len(rows)} rows, the first is row "
            f"{blank[0]}. Remove these rows."
        )


def _held_out(count: int, seed: int) -> tuple[list[int], list[int]]:
    """(training rows, rows held out for validation) of `count`."""
    if count < 2:
        raise DataError("data.train has 1 row, of which none can be held out; give more rows, or data.validation.")
    parts = Dataset.from_dict({"row": range(count)}).train_test_split(test_size=HELD_OUT, seed=seed)
    return parts["train"]["row"][:], parts["test"]["row"][:]


def _require_a_row_each(limit: int, classes: Sequence[Any]) -> None:
    if limit < len(set(classes)):
        raise DataError(
            f"data.train_rows is {limit}, but data.train has rows of {len(set(classes))} classes, each of which needs "
            f"one; set it to at least {len(set(classes))}."
        )


def _from_file(split: str, file: str) -> Dataset:
    path = Path(file)
    if not is_file(path):
        raise DataError(
            f"data.{split} is {file!r}, and there is no such file. Give a path, or set data.name to use a hub data set."
        )
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in _FORMATS:
        raise DataError(f"data.{split} is {file!r}; readable are {', '.join(_FORMATS)}, also with .gz behind.")
    try:
        with silenced("datasets"):
            return load_dataset(_FORMATS[suffix], data_files=str(path), split="train", **_OPTIONS.get(suffix, {}))
    except StopIteration as error:  # what `datasets` makes of an empty file
        raise DataError(f"data.{split}: {file!r} has no rows.") from error
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = one_line(error.__cause__ or error)
        raise DataError(f"data.{split}: {file!r} cannot be read as {_FORMATS[suffix]}: {cause}") from error


def _from_hub(data: DataSection, wanted: Mapping[str, str]) -> DatasetDict:
    name = str(data.name)
    folder = data.config if name == "imagefolder" else name if name.startswith(("/", ".", "~")) else None
    if folder is not None and not Path(folder).exists():
        key = "config" if name == "imagefolder" else "name"
        raise DataError(f"data.{key} is {folder!r}, and there is no such folder. Give files with data.train instead.")
    try:
        with silenced("datasets", "huggingface_hub"):
            available = (
                load_dataset(name, data_dir=folder) if name == "imagefolder" else load_dataset(name, data.config)
            )
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(
            f"data.name is {name!r} (config {data.config!r}), which cannot be loaded: {one_line(error)} Without access "
            "to the hub, leave data.name out and give files."
        ) from error
    for key, split in wanted.items():
        if split not in available:
            raise DataError(f"data.{key} is {split!r}; the splits of {name!r} are {', '.join(available)}.")
    return DatasetDict({key: available[split] for key, split in wanted.items()})
