"""AdaLoRA in any transformers Trainer, by one entry in its list of callbacks.

The Trainer tells a callback when the model is known but the optimizer is not (`on_init_end`): there the model
is converted. It tells the number of steps when training begins: there the allocator attaches to the
optimizer. From then on the optimizer's own hooks do the work, so it does not matter how the Trainer clips,
accumulates or scales. What it saves on the way is the business of `saving`.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import nn

from ..allocator import RankAllocator
from ..config import AdaLoraConfig
from ..errors import ConfigError, TrainingError
from ..injection import adapter_config, inject
from ..regularizer import orthogonality_penalty
from .checksums import Checksums
from .models import is_adapted, with_task_head
from .saving import prepare_saving
from .starting import start_from_rows_

logger = logging.getLogger("adalora")


class AdaLoraCallback(Checksums):
    """`Trainer(..., callbacks=[AdaLoraCallback(config)])` trains with AdaLoRA; nothing else changes.

    The model may be adapted already; if not, it is adapted with `config`, whose `modules_to_save` default to
    the model's task head. The run's length comes from the Trainer, and so do the rows of a start from data, once,
    before the first step (`starting`). When training ends, also early, the budget is met. The logs gain
    adalora/budget, adalora/phase and adalora/orthogonality. `compact` frees pruned triplets as soon as the pattern is
    final. `allocator` is the RankAllocator once training has begun. Checkpoints get checksums.
    """

    def __init__(self, config: AdaLoraConfig | None = None, *, compact: bool = False) -> None:
        self.config = config
        self.compact = compact
        self.allocator: RankAllocator | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adapt the model, before there is an optimizer."""
        if args.deepspeed or args.fsdp:
            raise TrainingError(
                "AdaLoraCallback supports one process, device_map and DDP: with DeepSpeed and FSDP a Trainer writes "
                "its checkpoints from one process, which does not hold the adapter. Unset `deepspeed` and `fsdp` in "
                "TrainingArguments, or use FSDP2 in a loop of your own or accelerate's (docs/scale.md)."
            )
        model: nn.Module = kwargs["model"]
        if not is_adapted(model):
            inject(model, with_task_head(self.config or AdaLoraConfig(), model))
        elif self.config is not None and not _chosen_so(model, self.config):
            raise ConfigError(
                "the model is adapted already, with another configuration; pass AdaLoraCallback() without one."
            )
        prepare_saving(model, args.load_best_model_at_end)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer, which has its restored state by now, for the run's number of steps."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if not is_adapted(model):
            raise TrainingError(
                "the model has no adapter: AdaLoraCallback was added after the Trainer was built, or a `model_init` "
                "built the model anew. Pass Trainer(callbacks=[AdaLoraCallback()]); with a `model_init`, let it "
                "return adalora.inject(model, config)."
            )
        prepare_saving(model, args.load_best_model_at_end)  # of a model that came only now
        self.allocator = allocator = RankAllocator(model, state.max_steps, compact=self.compact).attach(optimizer)
        if state.global_step and not allocator.step:
            raise TrainingError(
                f"the run goes on behind step {state.global_step}, but the checkpoint held no state of the optimizer, "
                "in which the method keeps its step, masks and averages. Resume from a complete checkpoint (see "
                "integrations.checkpoints), saved without save_only_model; or train anew from its adapter with "
                "adalora.load_adapter(model, folder, trainable=True)."
            )
        # The optimizer outlives a run that failed, as where auto_find_batch_size tries again. A pattern that is
        # final stays, though: whoever trains on has spent the budget already.
        if state.global_step == 0 and not allocator.frozen:
            allocator.restart()
        if state.global_step == 0:
            start_from_rows_(model, kwargs.get("train_dataloader"), args, state.train_batch_size)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add what the method did to the training logs."""
        if self.allocator is None or logs is None or "loss" not in logs:
            return
        with torch.no_grad():
            penalty = float(orthogonality_penalty(self.allocator.root))
        own = {
            "adalora/budget": self.allocator.budget,
            "adalora/phase": self.allocator.phase.value,
            "adalora/orthogonality": penalty,
        }
        logs.update(own)
        if state.log_history:
            state.log_history[-1].update(own)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Meet the budget, whatever ended the training and whichever checkpoint was loaded last."""
        allocator = self.allocator
        if allocator is None or allocator.step == 0:
            return
        frozen, before = allocator.frozen, acting_triplets(allocator)
        allocator.finalize()
        if frozen and before > acting_triplets(allocator):
            logger.warning(
                "the model loaded at the end is from before the budget was met: %d triplets outside the final "
                "pattern were cut; let load_best_model_at_end choose among checkpoints of the final phase",
                before - acting_triplets(allocator),
            )
        logger.info("budget %d / %d %s reached", allocator.spent, allocator.schedule.target_budget, allocator.unit)


def _chosen_so(model: nn.Module, config: AdaLoraConfig) -> bool:
    """Whether `model` was injected with `config`, which may leave the task head and lora_alpha open."""
    actual = adapter_config(model)
    if config.lora_alpha is None:
        actual = dataclasses.replace(actual, lora_alpha=None)
    return actual in (config, with_task_head(config, model))


def acting_triplets(allocator: RankAllocator) -> int:
    """Triplets whose Λ is not zero."""
    return sum(int(module.lora_E.count_nonzero()) for module in allocator.modules.values())
