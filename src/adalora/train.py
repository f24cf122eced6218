"""Recipe → trained adapter and its record, on transformers.Trainer."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from rich.console import Console
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from .card import CardFacts, model_card
from .errors import AdaLoraError, AdapterFileError, ConfigError
from .files import write_files
from .htmlreport import write_report
from .integrations.best import BestWithinBudget, Patience
from .integrations.ordering import SameOrder
from .integrations.plots import save_budget_curve, save_heatmap
from .integrations.stopping import StopGracefully
from .integrations.transformers import AdaLoraCallback
from .methods import build_method
from .methods.adalora import AdaLora
from .methods.base import Method, ParameterCount
from .plan import PlanPrinter
from .quantizedmodels import rounds_inputs
from .recipe import Recipe
from .records import CHECKPOINTS, RESULT, ProgressLine, RunRecorder, claimed, explained, loggers_last
from .report import RankReport, rank_report
from .resolve import (
    DECAY,
    PATIENCE,
    check_training,
    resolve_model,
    resolve_recipe,
    resolve_training,
    training_arguments,
)
from .resuming import last_checkpoint, require_same, resumed, rewind
from .tasks.base import Task, build_task
from .tasks.quantization import check_quantization

_WORKING = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by accelerate's name of a precision


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


@dataclass
class _Job:
    """A run that is ready to begin."""

    recipe: Recipe
    out: Path
    console: Console
    method: Method
    source: AdaLoraCallback | None
    task: Task
    path: str
    base: str
    model: nn.Module
    recorder: RunRecorder
    stop: StopGracefully
    line: ProgressLine
    patience: Patience | None
    checkpoint: Path | None
    trainer: Trainer

    @property
    def stopped(self) -> str | None:
        """Why the run ended before its last step."""
        return self.stop.reason or (self.patience.reason if self.patience else None)


def run(recipe: Recipe, out: Path, console: Console, resume: bool = False) -> RunResult:
    """Train what `recipe` says and fill the new folder `out`, or go on with the run in it that was cut short.

    `out` gets adapter/, recipe.yaml, metrics.jsonl, ranks.jsonl, result.json, README.md, report.html and, for
    AdaLoRA, ranks.png and budget.png. Raises AdaLoraError, with `out` as it was, for anything wrong with the input;
    what goes wrong once training has begun leaves `out` with the reason in FAILED.txt, and the next run replaces it
    or, with `resume`, goes on from its last complete checkpoint to the same result, bit by bit.
    """
    quiet()
    with resumed(out) if resume else claimed(out), explained(out):
        job = _prepare(recipe, out, console, resume)
        return _finish(job, _fit(job))


def check(recipe: Recipe, out: Path) -> Method:
    """The recipe's method, if its sections method and training hold. Raises ConfigError; reads no data."""
    method = build_method(recipe.method)
    check_quantization(recipe)
    check_training(recipe, out)
    return method


def _prepare(recipe: Recipe, out: Path, console: Console, resume: bool) -> _Job:
    method = check(recipe, out)
    recipe = resolve_recipe(recipe, method)
    path, base = resolve_model(recipe)
    task = build_task(path, recipe)
    recipe = resolve_training(recipe, task)
    arguments = training_arguments(recipe, out, task)
    checkpoint, live = None, []
    if resume:
        require_same(recipe, out)
        find = last_checkpoint if method.resumable else no_checkpoint
        checkpoint = find(out, lambda line: console.print(f"  {line}", markup=False))
        live = rewind(out, step_of(checkpoint))
    set_seed(recipe.seed)
    model = method.prepare(task.build_model(path, recipe))
    source = method.callback if isinstance(method, AdaLora) else None
    recorder, stop = RunRecorder(out, recipe, source, live), StopGracefully(recipe.max_minutes)
    line = ProgressLine(console, source, str(recipe.method["name"]))
    patience = Patience(recipe.training[PATIENCE]) if recipe.training.get(PATIENCE) else None
    best = [BestWithinBudget(source), *([patience] if patience else [])]
    plan = PlanPrinter(console, method, source, task)
    callbacks = [*method.callbacks(), plan, *best, SameOrder(), line, stop, recorder]
    undecayed = [] if recipe.training[DECAY] or not arguments.weight_decay else method.added(model)
    trainer = build_trainer(model, arguments, task, callbacks, undecayed)
    return _Job(
        recipe,
        out,
        console,
        method,
        source,
        task,
        path,
        base,
        model,
        recorder,
        stop,
        line,
        patience,
        checkpoint,
        trainer,
    )


def _fit(job: _Job) -> float:
    """Train; returns the seconds that it took."""
    started = time.monotonic()
    try:
        job.trainer.train(resume_from_checkpoint=str(job.checkpoint) if job.checkpoint else None)
    finally:
        job.stop.restore()
        job.line.close()
    return time.monotonic() - started


def _finish(job: _Job, seconds: float) -> RunResult:
    """Score, save, reload and record."""
    task, model, out = job.task, job.model, job.out
    split = "test" if "test" in task.splits else "validation"
    scores = task.evaluate(job.trainer, split)
    validation = _validation_scores(job, split, scores)
    save(job, out / "adapter")
    difference = reload_difference(job, out / "adapter", split)
    job.console.print(f"  saved and reloaded: outputs differ by at most {difference:.1e}")
    report, count = rank_report(model) if job.source else None, job.method.count(model)
    steps = job.trainer.state.global_step
    result = RunResult(out, scores, validation, task.metric, count, seconds, steps, job.stopped, report, model, task)
    write_record(job, result, split)
    return result


def _validation_scores(job: _Job, split: str, scores: dict[str, float]) -> dict[str, float] | None:
    """What a choice between runs is to be made on; None where metrics.jsonl has it for each epoch or interval."""
    data = job.recipe.data
    if split == "validation":
        return scores
    if str(job.trainer.args.eval_strategy.value) != "no":
        return None
    if (data.validation, data.validation_rows) == (data.test, data.test_rows):  # one set, scored already
        return scores
    return job.task.evaluate(job.trainer, "validation")


def quiet() -> None:
    """Leave the screen to our own line: no bars, and no report that a new head is new."""
    # PEFT 0.21 asks transformers 5.23 by an old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def build_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    task: Task,
    callbacks: list[TrainerCallback],
    undecayed: Sequence[nn.Parameter] = (),
) -> Trainer:
    """The task's Trainer, silent but for our own line, whose weight decay leaves the parameters `undecayed` out.

    Raises ConfigError for arguments that it refuses.
    """
    try:
        trainer = task.trainer_type(
            model=model,
            args=arguments,
            train_dataset=task.splits["train"],
            eval_dataset=task.splits["validation"],
            data_collator=task.collator,
            processing_class=task.processor,
            callbacks=callbacks,
            **task.trainer_options,
        )
        if undecayed:
            _leave_out(trainer, undecayed)
        trainer.create_optimizer()  # train() would, but there nobody knows whose mistake an error is
    except AdaLoraError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"in section training: {error}") from error
    trainer.remove_callback(PrinterCallback)
    loggers_last(trainer)
    return trainer


def _leave_out(trainer: Trainer, undecayed: Sequence[nn.Parameter]) -> None:
    """Put these into the Trainer's group without weight decay, where biases and norms are."""
    usual, own = trainer.get_decay_parameter_names, {id(parameter) for parameter in undecayed}

    def names(model: nn.Module) -> list[str]:
        known = {name for name, parameter in model.named_parameters() if id(parameter) in own}
        return [name for name in usual(model) if name not in known]

    trainer.get_decay_parameter_names = names


def save(job: _Job, folder: Path) -> None:
    """The adapter, the tokenizer or image processor, and the base model's configuration, which names the labels."""
    job.method.save(job.model, folder, job.base, job.task.task_type)
    job.task.processor.save_pretrained(folder)
    wrapped: Any = job.model
    base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    base.config.save_pretrained(folder)


def reload_difference(job: _Job, folder: Path, split: str) -> float:
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


def write_record(job: _Job, result: RunResult, split: str) -> None:
    """result.json, README.md, and the two pictures."""
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


def no_checkpoint(out: Path, say: Callable[[str], None]) -> None:
    """For a method whose checkpoints do not hold all that it needs to go on: they are removed."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # there is none before the first one was written
    say("this method cannot go on from a checkpoint: the run starts again at its first step")


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step after which a checkpoint was written; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


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
