"""Whether the adapter that a run has saved gives the outputs of the model that it trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import AdapterFileError
from .job import Job
from .quantizedmodels import rounds_inputs

_WORKING = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by accelerate's name of a precision


def reload_difference(job: Job, folder: Path, split: str) -> float:
    """Largest difference of outputs, on a few rows, between the model and the adapter in a fresh base."""
    task, model = job.task, job.model
    batch, name = task.probe(model, split)
    device = next(model.parameters()).device
    fresh = job.method.load(task.build_model(job.path, job.recipe), folder).to(device)
    # The Trainer leaves autocast around the forward of the model that it trained.
    with torch.no_grad(), job.trainer.accelerator.autocast():
        live, read = (getattr(m.eval()(**batch), name).float() for m in (model, fresh))
    difference = float((live - read).abs().max())
    # The increments themselves were compared when they were saved.
    working = _WORKING.get(job.trainer.accelerator.mixed_precision, next(model.parameters()).dtype)
    if not difference <= reload_tolerance(live, working, rounds_inputs(model)):
        raise AdapterFileError(
            f"the adapter reloaded from {str(folder)!r} gives {name} that differ by {difference:.3e}."
        )
    return difference


def reload_tolerance(outputs: Tensor, working: torch.dtype, rounds_inputs: bool = False) -> float:
    """How far outputs may lie apart that were computed in dtype `working` with and without pruned triplets.

    Sums over other numbers of terms round differently, in 16 bits by up to a few units in the last place, and more
    where the base rounds its inputs to 8 bits.
    """
    part = 0.05 if rounds_inputs else max(1e-3, 4 * torch.finfo(working).eps)
    return part * max(1.0, float(outputs.abs().max()))
