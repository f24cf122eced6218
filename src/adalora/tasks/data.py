"""Rows from the hub or from local files, by `datasets`, with every mistake in a recipe explained."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..errors import DataError
from ..recipe import DataSection

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

HELD_OUT = 0.1  # of the training set, where a recipe has no validation set


def load_splits(data: DataSection, seed: int) -> DatasetDict:
    """The splits train, validation and, if there is one, test. Raises DataError."""
    wanted = {name: getattr(data, name) for name in ("train", "validation", "test") if getattr(data, name)}
    splits = _from_hub(data, wanted) if data.name else DatasetDict({k: _from_file(k, v) for k, v in wanted.items()})
    for name, rows in splits.items():
        if not len(rows):
            raise DataError(f"data.{name} ({wanted[name]!r}) has no rows.")
    if "validation" not in splits:
        parts = splits["train"].train_test_split(test_size=HELD_OUT, seed=seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    for name, rows in splits.items():
        require_columns(rows, [c for c in (data.text, data.text_pair, data.label) if c], f"data.{name}")
    return splits


def require_columns(rows: Dataset, columns: list[str], where: str) -> None:
    """Raise DataError unless `rows` has all `columns`."""
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}. Name yours with "
            "data.text, data.text_pair and data.label."
        )


def _from_file(split: str, file: str) -> Dataset:
    path = Path(file)
    if not path.is_file():
        raise DataError(
            f"data.{split} is {file!r}, and there is no such file. Give a path, or set data.name to use a hub data set."
        )
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in _FORMATS:
        raise DataError(f"data.{split} is {file!r}; readable are {', '.join(_FORMATS)}, also with .gz behind.")
    options = {"delimiter": "\t"} if suffix == ".tsv" else {}
    try:
        return load_dataset(_FORMATS[suffix], data_files=str(path), split="train", **options)
    except StopIteration as error:  # what `datasets` makes of an empty file
        raise DataError(f"data.{split}: {file!r} has no rows.") from error
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(f"data.{split}: {file!r} cannot be read as {_FORMATS[suffix]}: {cause}") from error


def _from_hub(data: DataSection, wanted: dict[str, str]) -> DatasetDict:
    try:
        available = load_dataset(data.name, data.config)
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(
            f"data.name is {data.name!r} (config {data.config!r}), which cannot be loaded: {error} Without access to "
            "the hub, leave data.name out and give files."
        ) from error
    for key, split in wanted.items():
        if split not in available:
            raise DataError(f"data.{key} is {split!r}; the splits of {data.name!r} are {', '.join(available)}.")
    return DatasetDict({key: available[split] for key, split in wanted.items()})
