"""The Trainer of a run: of the task's own kind, silent, its loggers behind our callbacks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from .errors import AdaLoraError, ConfigError
from .tasks.base import Task


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


def give_head_its_rate(trainer: Trainer, heads: Sequence[str], rate: float) -> None:
    """Let what trains inside the modules `heads`, named as in the base model, have a learning rate of its own.

    It follows the same schedule. Raises ConfigError if nothing trains there.
    """
    inside = re.compile("|".join(rf"(?:^|\.){re.escape(head)}\." for head in heads) or "$^")
    own = {id(p) for name, p in trainer.model.named_parameters() if p.requires_grad and inside.search(name)}
    if not own:
        raise ConfigError("'training.head_learning_rate' is set, but no head trains in this model; leave it out.")
    groups = trainer.optimizer.param_groups
    for group in list(groups):
        head = [parameter for parameter in group["params"] if id(parameter) in own]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        if head:
            groups.append({**group, "params": head, "lr": rate})
    groups[:] = [group for group in groups if group["params"]]


def loggers_last(trainer: Trainer) -> None:
    """Let TensorBoard, W&B and the like see a log when every other callback has added its part to it."""
    loggers = get_reporting_integration_callbacks(trainer.args.report_to)
    trainer.callback_handler.callbacks.sort(key=lambda callback: type(callback) in loggers)
