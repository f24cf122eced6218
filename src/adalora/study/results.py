"""results.jsonl: one line for each run that finished or failed, written by the process that holds the lock."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError, ConfigError
from ..files import write_files

RESULTS, LOCK = "results.jsonl", "lock"
Record = dict[str, Any]


@contextmanager
def sole_runner(out: Path) -> Iterator[None]:
    """Hold the study in `out` against a second runner, by a lock that the system drops with the process.

    Raises ConfigError if another process has it, or if `out` cannot be a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be a study's folder: {error.strerror}; name another.") from error
    try:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(handle, 32).decode().strip()
                raise ConfigError(
                    f"the study in {str(out)!r} is being run by process {holder}; end that one first, or choose "
                    "another --out."
                ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def read_results(out: Path) -> list[Record]:
    """All records, in the order of writing. A last line that was torn by a kill is left out.

    Raises AdapterFileError for any other line that is no record.
    """
    file = out / RESULTS
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    records: list[Record] = []
    for number, line in enumerate(lines[:-1], 1):  # what stands behind the last line end is torn
        try:
            record = json.loads(line)
            record["id"], record["status"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            shown = line.decode(errors="replace")
            raise AdapterFileError(
                f"{str(file)!r}, line {number}, is no result of a run ({shown!r:.60}); remove the line, and the run is "
                "done again."
            ) from error
        records.append(record)
    return records


def keep_only(out: Path, records: list[Record]) -> None:
    """Write the file anew with these records, whole or not at all."""
    text = "".join(_line(record) for record in records)
    write_files(out, {RESULTS: lambda path: path.write_text(text, encoding="utf-8")})


def append(out: Path, record: Record) -> None:
    """One more line, on the disk when this returns."""
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def points(record: Record, split: str) -> float | None:
    """A run's score in points, None if it failed.

    A score that is not defined, as the correlation of constant answers, counts as 0.
    """
    return None if record["status"] != "finished" else 100 * (record[split] or 0.0)


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
