"""What a run is going to do, printed before its first step."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import nn
from transformers import TrainerCallback

from .importance import kept_numbers
from .injection import adapter_config
from .integrations.starting import describe_start
from .integrations.transformers import AdaLoraCallback
from .methods.base import Method
from .report import rank_report
from .schedule import Schedule
from .tasks.base import Task

_BYTES = 4  # adapters, their gradients, Adam's moments and the averages are all fp32


class PlanPrinter(TrainerCallback):
    """Prints the plan once the Trainer knows the number of steps; stands behind `source` in its callbacks."""

    def __init__(self, console: Console, method: Method, source: AdaLoraCallback | None, task: Task) -> None:
        self.console, self.method, self.source, self.task = console, method, source, task

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print it."""
        allocator = self.source.allocator if self.source else None
        schedule = allocator.schedule if allocator else None
        lines = plan_lines(kwargs["model"], self.method, schedule, state.max_steps)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        start = describe_start(adapter_config(kwargs["model"]), rows) if allocator and not state.global_step else None
        lines += [f"start      {start}"] if start else []
        for line in [f"task       {self.task.describe()}", *lines]:
            self.console.print(f"  {escape(line)}")


def plan_lines(model: nn.Module, method: Method, schedule: Schedule | None, steps: int) -> list[str]:
    """Matrices, triplets, parameters before and after, schedule in steps, and memory."""
    count = method.count(model)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = 4 * (count.peak + count.head)  # weight, gradient, two moments
    if schedule is None:
        head = f"parameters {count.final:,} in adapters, {count.head:,} in the head; {steps} steps"
        return [head, _memory_line(frozen, trained)]
    report = rank_report(model)
    even = count.peak * schedule.target_budget // max(schedule.initial_budget, 1)
    triplets = sum(row.capacity for row in report.rows)
    trained += kept_numbers(adapter_config(model).importance, triplets, count.peak)
    in_parameters = adapter_config(model).budget == "params"
    kept, bound = ("as many as fit", "at most") if in_parameters else (schedule.target_budget, "if spread evenly")
    reduction = schedule.freeze_step - schedule.tinit
    return [
        f"matrices   {len(report.rows)}",
        f"triplets   {triplets} at the start, {kept} in the end",
        f"parameters {count.peak:,} at the start, {even:,} in the end {bound}; {count.head:,} in the head",
        f"schedule   {steps} steps: {schedule.tinit} warm-up, {reduction} reduction with an allocation every "
        f"{schedule.deltaT}, {steps - schedule.freeze_step} final",
        _memory_line(frozen, trained),
    ]


def _memory_line(frozen: int, trained: int) -> str:
    trains = trained * _BYTES / 1e6
    return f"memory     {frozen / 1e6:.0f} MB frozen base + {trains:.1f} MB for what trains, beside activations"
