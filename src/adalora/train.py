"""Recipe → trained adapter and its record, on transformers.Trainer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from .claiming import claimed, require_one_process
from .failures import explained
from .integrations.best import BestWithinBudget, Patience
from .integrations.checksums import Checksums
from .integrations.ordering import SameOrder
from .integrations.stopping import StopGracefully
from .job import Job
from .methods import build_method
from .methods.adalora import AdaLora
from .methods.base import Method
from .methods.trained import head_modules
from .plan import PlanPrinter
from .recipe import Recipe
from .records import RunRecorder
from .reloading import reload_difference
from .report import rank_report
from .resolve import (
    DECAY,
    HEAD_RATE,
    PATIENCE,
    check_training,
    resolve_model,
    resolve_recipe,
    resolve_training,
    training_arguments,
)
from .result import RunResult, write_record
from .resuming import last_checkpoint, no_checkpoint, require_same, resumed, rewind, step_of
from .screen import ProgressLine, quiet
from .tasks.base import build_task
from .tasks.quantization import check_quantization
from .trainer import build_trainer, give_head_its_rate


def run(recipe: Recipe, out: Path, console: Console, resume: bool = False) -> RunResult:
    """Train what `recipe` says and fill the new folder `out`, or go on with the run in it that was cut short.

    `out` gets adapter/, recipe.yaml, metrics.jsonl, ranks.jsonl, result.json, README.md, report.html and, for
    AdaLoRA, ranks.png and budget.png. Raises AdaLoraError, with `out` as it was, for anything wrong with the input;
    what goes wrong once training has begun leaves `out` with the reason in FAILED.txt, and the next run replaces it
    or, with `resume`, goes on from its last complete checkpoint to the same result, bit by bit.
    """
    require_one_process()  # else all but one would find the folder taken
    quiet()
    with resumed(out) if resume else claimed(out), explained(out):
        job = _prepare(recipe, out, console, resume)
        return _finish(job, _fit(job))


def check(recipe: Recipe, out: Path) -> Method:
    """The recipe's method, if its sections method and training hold, and nothing starts it several times.

    Raises ConfigError; reads no data.
    """
    require_one_process()
    method = build_method(recipe.method)
    check_quantization(recipe)
    check_training(recipe, out)
    return method


def _prepare(recipe: Recipe, out: Path, console: Console, resume: bool) -> Job:
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
    model = task.build_model(path, recipe)
    heads = head_modules(model, method.options().get("modules_to_save"))
    model = method.prepare(model)
    source = method.callback if isinstance(method, AdaLora) else None
    recorder, stop = RunRecorder(out, recipe, source, live), StopGracefully(recipe.max_minutes)
    line = ProgressLine(console, source, str(recipe.method["name"]))
    patience = Patience(recipe.training[PATIENCE]) if recipe.training.get(PATIENCE) else None
    best = [BestWithinBudget(source), *([patience] if patience else [])]
    plan = PlanPrinter(console, method, source, task)
    sums = [] if source else [Checksums()]  # `source` writes its own
    callbacks = [*method.callbacks(), plan, *best, SameOrder(), line, stop, *sums, recorder]
    undecayed = [] if recipe.training[DECAY] or not arguments.weight_decay else method.added(model)
    trainer = build_trainer(model, arguments, task, callbacks, undecayed)
    if recipe.training[HEAD_RATE] is not None:
        give_head_its_rate(trainer, heads, recipe.training[HEAD_RATE])
    return Job(
        recipe=recipe,
        out=out,
        console=console,
        method=method,
        source=source,
        task=task,
        path=path,
        base=base,
        model=model,
        recorder=recorder,
        stop=stop,
        line=line,
        patience=patience,
        checkpoint=checkpoint,
        trainer=trainer,
    )


def _fit(job: Job) -> float:
    """Train; returns the seconds that it took."""
    started = time.monotonic()
    try:
        job.trainer.train(resume_from_checkpoint=str(job.checkpoint) if job.checkpoint else None)
    finally:
        job.stop.restore()
        job.line.close()
    return time.monotonic() - started


def _finish(job: Job, seconds: float) -> RunResult:
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


def _validation_scores(job: Job, split: str, scores: dict[str, float]) -> dict[str, float] | None:
    """What a choice between runs is to be made on; None where metrics.jsonl has it for each epoch or interval."""
    data = job.recipe.data
    if split == "validation":
        return scores
    if str(job.trainer.args.eval_strategy.value) != "no":
        return None
    if (data.validation, data.validation_rows) == (data.test, data.test_rows):  # one set, scored already
        return scores
    return job.task.evaluate(job.trainer, "validation")


def save(job: Job, folder: Path) -> None:
    """The adapter, the tokenizer or image processor, and the base model's configuration, which names the labels."""
    job.method.save(job.model, folder, job.base, job.task.task_type)
    job.task.processor.save_pretrained(folder)
    wrapped: Any = job.model
    base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    base.config.save_pretrained(folder)
