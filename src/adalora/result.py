"""What a run gave, and its record: result.json, README.md, two pictures and report.html."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from .card import CardFacts, model_card
from .files import write_files
from .htmlreport import write_report
from .integrations.plots import save_budget_curve, save_heatmap
from .job import Job
from .methods.base import ParameterCount
from .report import RankReport
from .resuming import step_of
from .runfiles import RESULT
from .tasks.base import Task


@dataclass(frozen=True)
class RunResult:
    """What a run gave. `scores` are of the test set, or of the validation set where there is no test set.

    `validation` are those of the validation set, if nothing was evaluated while training.
    """

    folder: Path
    scores: dict[str, float]
    validation: dict[str, float] | None
    metric: str
    count: ParameterCount
    seconds: float
    steps: int
    stopped: str | None
    report: RankReport | None
    model: nn.Module
    task: Task


def write_record(job: Job, result: RunResult, split: str) -> None:
    """Fill the folder of a run that is over."""
    # Where the rows of a split are windows, the task keeps what they were cut from.
    whole = getattr(result.task, "questions", result.task.splits)
    rows = {name: len(split_rows) for name, split_rows in whole.items()}
    record = {
        "task": job.recipe.task,
        "method": job.recipe.method["name"],
        "base": job.base,
        "split": split,
        "rows": rows,
        "labels": result.task.labels,
        "scores": result.scores,
        "validation": result.validation,
        "metric": result.metric,
        "parameters": dataclasses.asdict(result.count),
        "train_seconds": round(result.seconds, 1),  # since it was resumed
        "resumed_from": step_of(job.checkpoint),
        "steps": result.steps,
        "stopped": result.stopped,
        "complete": job.stop.reason is None,
        "environment": environment(job.model),
    }
    facts = CardFacts(
        job.base, result.task.labels, rows, split, result.scores, result.count, result.steps, result.stopped
    )
    card = model_card(job.recipe, facts, result.report)
    writers = {
        RESULT: lambda path: path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8"),
        "README.md": lambda path: path.write_text(card, encoding="utf-8"),
    }
    report, allocator = result.report, job.source.allocator if job.source else None
    if report is not None and allocator is not None:
        writers["ranks.png"] = lambda path: save_heatmap(report, path)
        writers["budget.png"] = lambda path: save_budget_curve(
            allocator.schedule, job.recorder.live, result.steps, path, allocator.unit
        )
    write_files(result.folder, writers)
    write_report(result.folder)


def environment(model: nn.Module) -> dict[str, str | int]:
    """Versions and hardware of a run, for its record."""
    device = next(model.parameters()).device
    return {
        "adalora": importlib.metadata.version("adalora"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
