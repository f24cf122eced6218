"""Reading JSON that may be damaged or not ours: whatever is wrong with it becomes one clear error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import AdaLoraError, AdapterFileError


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises AdapterFileError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"cannot read {str(file)!r}: {error}. Restore it from a copy.") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{str(file)!r} holds no JSON object; restore it from a copy.")
    return value


def read_records(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines, up to the first that is torn, as the last one is where a run was killed.

    None if there is no such file.
    """
    records: list[dict[str, Any]] = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


@contextmanager
def believed(where: Path, *more: type[Exception]) -> Iterator[None]:
    """Around code that takes records for what they were when we wrote them: else AdapterFileError, naming `where`.

    `more` are errors that the code, of another library, has for what it cannot read.
    """
    ours = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
    expected: tuple[type[Exception], ...] = (*ours, *more)
    try:
        yield
    except AdaLoraError:
        raise
    except expected as error:
        raise AdapterFileError(
            f"the files in {str(where)!r} are not as they were written ({type(error).__name__}: {str(error)[:200]}). "
            "Restore them from a copy."
        ) from error
