"""Recipe → trained adapter and its record, on transformers.Trainer."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from .card import CardFacts, model_card
from .errors import AdaLoraError, AdapterFileError, ConfigError
from .files import write_files
from .integrations.plots import save_budget_curve, save_heatmap
from .integrations.stopping import StopGracefully
from .integrations.transformers import AdaLoraCallback
from .methods import build_method
from .methods.adalora import AdaLora
from .methods.base import Method, ParameterCount
from .plan import PlanPrinter
from .recipe import Recipe
from .records import ProgressLine, RunRecorder, claimed, explained
from .report import RankReport, rank_report
from .resolve import resolve_model, resolve_recipe, training_arguments
from .tasks.classification import ClassificationTask, build_task


@dataclass(frozen=True)
class RunResult:
    """What a run gave. `scores` are of the test set, or of the validation set where there is no test set."""

    folder: Path
    scores: dict[str, float]
    metric: str
    count: ParameterCount
    seconds: float
    steps: int
    stopped: str | None
    report: RankReport | None
    model: nn.Module
    task: ClassificationTask


@dataclass
class _Job:
    """A run that is ready to begin."""

    recipe: Recipe
    out: Path
    console: Console
    method: Method
    source: AdaLoraCallback | None
    task: ClassificationTask
    path: str
    base: str
    model: nn.Module
    recorder: RunRecorder
    stop: StopGracefully
    line: ProgressLine
    trainer: Trainer


def run(recipe: Recipe, out: Path, console: Console) -> RunResult:
    """Train what `recipe` says and fill the new folder `out`.

    `out` gets adapter/, recipe.yaml, metrics.jsonl, ranks.jsonl, result.json, README.md and, for AdaLoRA,
    ranks.png and budget.png. Raises AdaLoraError, with `out` as it was, for anything wrong with the input; what
    goes wrong once training has begun leaves `out` with the reason in FAILED.txt, and the next run replaces it.
    """
    quiet()
    with claimed(out), explained(out):
        job = _prepare(recipe, out, console)
        return _finish(job, _fit(job))


def check(recipe: Recipe, out: Path) -> Method:
    """The recipe's method, if its sections method and training hold. Raises ConfigError; reads no data."""
    method = build_method(recipe.method)
    training_arguments(recipe, out)
    return method


def _prepare(recipe: Recipe, out: Path, console: Console) -> _Job:
    method = check(recipe, out)
    recipe = resolve_recipe(recipe, method)
    arguments = training_arguments(recipe, out)
    path, base = resolve_model(recipe)
    task = build_task(path, recipe)
    set_seed(recipe.seed)
    model = method.prepare(task.build_model(path, recipe))
    source = method.callback if isinstance(method, AdaLora) else None
    recorder, stop = RunRecorder(out, recipe, source), StopGracefully(recipe.max_minutes)
    line = ProgressLine(console, source, str(recipe.method["name"]))
    plan = PlanPrinter(console, method, source, task)
    trainer = build_trainer(model, arguments, task, [*method.callbacks(), plan, line, stop, recorder])
    return _Job(recipe, out, console, method, source, task, path, base, model, recorder, stop, line, trainer)


def _fit(job: _Job) -> float:
    """Train; returns the seconds that it took."""
    started = time.monotonic()
    try:
        job.trainer.train()
    finally:
        job.stop.restore()
        job.line.close()
    return time.monotonic() - started


def _finish(job: _Job, seconds: float) -> RunResult:
    """Score, save, reload and record."""
    task, model, out = job.task, job.model, job.out
    split = "test" if "test" in task.splits else "validation"
    scores = evaluate(job.trainer, task, split)
    save(job, out / "adapter")
    difference = reload_difference(job, out / "adapter", split)
    job.console.print(f"  saved and reloaded: logits differ by at most {difference:.1e}")
    report, count = rank_report(model) if job.source else None, job.method.count(model)
    steps, stopped = job.trainer.state.global_step, job.stop.reason
    result = RunResult(out, scores, task.metric, count, seconds, steps, stopped, report, model, task)
    write_record(job, result, split)
    return result


def quiet() -> None:
    """Leave the screen to our own line: no bars, and no report that a new head is new."""
    # PEFT 0.21 asks transformers 5.23 by an old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def build_trainer(
    model: nn.Module, arguments: TrainingArguments, task: ClassificationTask, callbacks: list[TrainerCallback]
) -> Trainer:
    """A stock Trainer, silent but for our own line. Raises ConfigError for arguments that it refuses."""
    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=task.splits["train"],
            eval_dataset=task.splits["validation"],
            data_collator=task.collator,
            compute_metrics=task.compute_metrics,
            callbacks=callbacks,
        )
        trainer.create_optimizer()  # train() would, but there nobody knows whose mistake an error is
    except AdaLoraError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"in section training: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluate(trainer: Trainer, task: ClassificationTask, split: str) -> dict[str, float]:
    """The task's metrics on a split."""
    prediction = trainer.predict(task.splits[split], metric_key_prefix=split)
    return task.compute_metrics(prediction)


def save(job: _Job, folder: Path) -> None:
    """The adapter, the tokenizer, and the base model's configuration, which knows the labels by name."""
    job.method.save(job.model, folder, job.base, "SEQ_CLS")
    job.task.tokenizer.save_pretrained(folder)
    wrapped: Any = job.model
    base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    base.config.save_pretrained(folder)


def reload_difference(job: _Job, folder: Path, split: str) -> float:
    """Largest difference of logits, on eight rows, between the model and the adapter in a fresh base."""
    task, model = job.task, job.model
    rows = task.splits[split].select(range(min(8, len(task.splits[split]))))
    columns = [name for name in rows.column_names if name not in ("labels", "length")]
    batch = task.tokenizer.pad([{c: row[c] for c in columns} for row in rows], return_tensors="pt")
    device = next(model.parameters()).device
    fresh = job.method.load(task.build_model(job.path, job.recipe), folder).to(device)
    with torch.no_grad():
        live, read = (m.eval()(**batch.to(device)).logits for m in (model, fresh))
    difference = float((live - read).abs().max())
    if not difference <= 1e-3 * max(1.0, float(live.abs().max())):
        raise AdapterFileError(
            f"the adapter reloaded from {str(folder)!r} gives logits that differ by {difference:.3e}."
        )
    return difference


def write_record(job: _Job, result: RunResult, split: str) -> None:
    """result.json, README.md, and the two pictures."""
    rows = {name: len(split_rows) for name, split_rows in result.task.splits.items()}
    record = {
        "split": split,
        "rows": rows,
        "labels": result.task.labels,
        "scores": result.scores,
        "metric": result.metric,
        "parameters": dataclasses.asdict(result.count),
        "train_seconds": round(result.seconds, 1),
        "steps": result.steps,
        "stopped": result.stopped,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    facts = CardFacts(
        job.base, result.task.labels, rows, split, result.scores, result.count, result.steps, result.stopped
    )
    card = model_card(job.recipe, facts, result.report)
    writers = {
        "result.json": lambda path: path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8"),
        "README.md": lambda path: path.write_text(card, encoding="utf-8"),
    }
    report, allocator = result.report, job.source.allocator if job.source else None
    if report is not None and allocator is not None:
        writers["ranks.png"] = lambda path: save_heatmap(report, path)
        writers["budget.png"] = lambda path: save_budget_curve(
            allocator.schedule, job.recorder.live, result.steps, path
        )
    write_files(result.folder, writers)
