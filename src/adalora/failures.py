"""What a machine or a logger refuses while a run lasts, as an AdaLoraError with the remedy."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.integrations import get_reporting_integration_callbacks

from .errors import AdaLoraError, AdapterFileError, TrainingError
from .tasks.foreign import one_line

_TORCH_WRITER = re.compile("PytorchStreamWriter|inline_container|unexpected pos")  # torch.save on a full disk


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turn what the machine or a logger refuses into an AdaLoraError with the remedy."""
    try:
        yield
    except AdaLoraError:
        raise
    except Exception as error:
        _explain(error, out)
        raise


def _explain(error: Exception, out: Path) -> None:
    """Raise the AdaLoraError that `error` comes to, if it is no bug of ours."""
    logger = _logger_in(error)
    if logger is not None:
        raise TrainingError(
            f"{logger} failed: {type(error).__name__}: {one_line(error)} Set it up, or leave it out of "
            "training.report_to (--log-to)."
        ) from error
    if isinstance(error, torch.OutOfMemoryError):
        raise TrainingError(
            f"the device is out of memory: {error}. Lower training.per_device_train_batch_size, and raise "
            "training.gradient_accumulation_steps as much."
        ) from error
    writing = isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error))
    if writing or isinstance(error, OSError | SafetensorError):
        raise AdapterFileError(
            f"the run in {str(out)!r} could not go on: {error}. Free space there, or choose another folder with --out."
        ) from error


def _logger_in(error: BaseException) -> str | None:
    """The class of transformers' callback for TensorBoard, W&B and the like that was at work, or None."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == get_reporting_integration_callbacks.__module__:
            return type(frame.f_locals.get("self")).__name__
    return None
