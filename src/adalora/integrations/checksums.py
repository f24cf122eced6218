"""Checksums beside the weights of a Trainer's checkpoint: safetensors has none, so a flipped bit would train on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..files import write_files

CHECKSUMS_FILE = "weights.sha256"


def write_checksums(checkpoint: Path) -> None:
    """Write those of all weights in a checkpoint, in the form of `sha256sum`, which can check them too.

    Raises AdapterFileError where the disk does not take them.
    """
    lines = [f"{_digest(file)}  {file.name}\n" for file in sorted(checkpoint.glob("*.safetensors"))]
    write_files(checkpoint, {CHECKSUMS_FILE: lambda path: path.write_text("".join(lines), encoding="utf-8")})


def changed(checkpoint: Path) -> str | None:
    """The first file that is not as it was written; None if all are, or if nothing was noted.

    Raises OSError for a file that cannot be read, ValueError for a list that is none.
    """
    noted = checkpoint / CHECKSUMS_FILE
    if not noted.exists():
        return None
    for line in noted.read_text(encoding="utf-8").splitlines():
        digest, gap, name = line.partition("  ")
        if not gap or Path(name).name != name:
            raise ValueError(f"{CHECKSUMS_FILE} holds a line that is none of ours")
        if _digest(checkpoint / name) != digest:
            return name
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
