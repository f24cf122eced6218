"""Which checkpoint of a Trainer is whole: it writes them file by file, so a killed run may leave half of one."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from .checksums import changed
from .saving import CHECKPOINT_PREFIX


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in a Trainer's `output_dir` from which a run can go on; None if there is none.

        trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))

    `resume_from_checkpoint=True` takes the newest whatever its state, and goes on without what it lacks.
    """
    return next((path for path in checkpoints(Path(folder)) if flaw(path) is None), None)


def checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints in `folder`, the newest first; none if there is no such folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(re.fullmatch(rf"{CHECKPOINT_PREFIX}(\d+)", path.name), path) for path in paths if path.is_dir()]
    return [path for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True)]


def flaw(checkpoint: Path) -> str | None:
    """What a checkpoint lacks for resuming from it; None if nothing."""
    try:
        if not isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict):
            return "trainer_state.json holds no object"
        weights = sorted(checkpoint.glob("*model*.safetensors"))
        if not weights:
            return "no weights"
        for file in weights:
            with safe_open(file, "pt"):
                pass
        flipped = changed(checkpoint)
        if flipped:
            return f"{flipped} is damaged: its checksum differs"
        # One state of the random generators for each process.
        states = sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
        for file in (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *states):
            fault = _fault(file)
            if fault:
                return f"{file.name} {fault}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name if error.filename else error} is missing"
    except (ValueError, RecursionError, OSError, SafetensorError, zipfile.BadZipFile) as error:
        return " ".join(str(error).split())
    return None


def _fault(file: Path) -> str | None:
    with zipfile.ZipFile(file) as archive:
        if archive.testzip():
            return "is damaged"
    try:
        with safe_globals():
            torch.load(file, map_location="meta", weights_only=True)  # the structure alone: no tensor is read
    except pickle.UnpicklingError:
        return "holds more than tensors and plain values, which is never loaded"
    except Exception as error:  # what is no pickle raises what it likes
        return f"is damaged ({type(error).__name__})"
    return None
