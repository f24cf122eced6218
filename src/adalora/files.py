"""Writing files so that a reader never meets half of one, whatever happens to the writer."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import AdapterFileError


def write_files(folder: str | Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Let each writer produce its file, and put all into `folder` once all are complete and on the disk.

    A folder that does not exist appears with everything in it. In one that does, files are replaced one after
    the other, JSON last; the rest of it stays. Raises AdapterFileError; then nothing changed.
    """
    with staged(folder) as staging:
        for name, write in writers.items():
            write(staging / name)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_file(path: str | Path) -> bool:
    """Whether there is such a file. A name that no system would take, such as a very long one, is none."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A hidden folder; at the end of the context its files take their place in `folder`, see above."""
    target = Path(folder)
    # Inside a folder that exists, since that may be a mount point, and files move only within a file system.
    staging = (target if target.is_dir() else target.parent) / f".adalora-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir(parents=True)
        yield staging
        _publish(staging, target)
    except AdapterFileError:
        raise
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"cannot write to {str(target)!r}: {getattr(error, 'strerror', None) or error}. Free space there or choose "
            "another folder; what was there before is untouched."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path) -> None:
    # Weights first: they hold the digest by which a reader notices that the JSON beside them is an older one.
    files = sorted(staging.iterdir(), key=lambda file: (file.suffix == ".json", file.name))
    for file in files:
        _sync(file)
    if target.exists():
        for file in files:
            file.replace(target / file.name)
        _sync(target)
    else:
        staging.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
