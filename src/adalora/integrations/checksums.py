"""Checksums beside the weights of a Trainer's checkpoint: safetensors has none, so a flipped bit would train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..files import digest, write_files
from .saving import CHECKPOINT_PREFIX

CHECKSUMS_FILE = "weights.sha256"


class Checksums(TrainerCallback):
    """Notes what the weights of each checkpoint are. AdaLoraCallback is one of these."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write checksums beside the weights, once the checkpoint is whole. Raises AdapterFileError."""
        checkpoint = Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{state.global_step}"
        if args.should_save and checkpoint.is_dir():  # a search over hyperparameters has its folders elsewhere
            write_checksums(checkpoint)


def write_checksums(checkpoint: Path) -> None:
    """Write those of all weights in a checkpoint, in the form of `sha256sum`, which can check them too.

    Raises AdapterFileError where the disk does not take them.
    """
    lines = [f"{digest(file)}  {file.name}\n" for file in sorted(checkpoint.glob("*.safetensors"))]
    write_files(checkpoint, {CHECKSUMS_FILE: lambda path: path.write_text("".join(lines), encoding="utf-8")})


def changed(checkpoint: Path) -> str | None:
    """The first file that is not as it was written; None if all are, or if nothing was noted.

    Raises OSError for a file that cannot be read, ValueError for a list that is none.
    """
    noted = checkpoint / CHECKSUMS_FILE
    if not noted.exists():
        return None
    for line in noted.read_text(encoding="utf-8").splitlines():
        noted_digest, gap, name = line.partition("  ")
        if not gap or Path(name).name != name:
            raise ValueError(f"{CHECKSUMS_FILE} holds a line that is none of ours")
        if digest(checkpoint / name) != noted_digest:
            return name
    return None
