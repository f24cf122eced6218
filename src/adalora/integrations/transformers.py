"""AdaLoRA in any transformers Trainer, by one entry in its list of callbacks.

The Trainer tells a callback when the model is known but the optimizer is not (`on_init_end`): there the model
is converted. It tells the number of steps when training begins: there the allocator attaches to the
optimizer. From then on the optimizer's own hooks do the work, so it does not matter how the Trainer clips,
accumulates or scales. Checkpoints shrink to adapter and trained head by transformers' own mechanism for keys
that need no saving, which is also what makes them load again. A sentence-transformers model cannot load a part
of itself: its folders hold merged weights and, in `adapter/`, the adapter.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..allocator import RankAllocator
from ..checkpoint import save_adapter
from ..config import AdaLoraConfig
from ..errors import AdapterFileError, ConfigError, InjectionError, TrainingError
from ..injection import adapter_config, adapter_root, inject, named_adapters, trained_biases
from ..merging import merge, unmerge
from ..quantizedmodels import unquantized_saving
from ..regularizer import orthogonality_penalty
from ..targets import saved_modules
from .starting import start_from_rows_

logger = logging.getLogger("adalora")

CHECKPOINT_PREFIX = "checkpoint-"  # of the folders from which a Trainer resumes

_NO_WAY_BACK = (
    "checkpoints of a sentence-transformers model hold merged weights, which its trainer cannot load back into an "
    "adapted model."
)


class AdaLoraCallback(TrainerCallback):
    """`Trainer(..., callbacks=[AdaLoraCallback(config)])` trains with AdaLoRA; nothing else changes.

    The model may be adapted already; if not, it is adapted with `config`, whose `modules_to_save` default to
    the model's task head. The run's length comes from the Trainer, and so do the rows of a start from data, once,
    before the first step (`starting`). When training ends, also early, the budget is met. The logs gain
    adalora/budget, adalora/phase and adalora/orthogonality. `compact` frees pruned triplets as soon as the pattern is
    final. `allocator` is the RankAllocator once training has begun.
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


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` has an adapter of ours."""
    try:
        adapter_root(model)
    except InjectionError:
        return False
    return True


def with_task_head(config: AdaLoraConfig, model: nn.Module) -> AdaLoraConfig:
    """`config` with the task head in `modules_to_save`, unless it says itself what to save.

    The head is what stands outside the base model and is not its output embedding, as in the paper's runs:
    such modules are new, and frozen they would stay random. The transformers model may be within `model`.
    """
    if config.modules_to_save is not None:
        return config
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            head = tuple(f"{name}.{part}".lstrip(".") for part in task_head(module))
            return dataclasses.replace(config, modules_to_save=head) if head else config
    return config


def task_head(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the modules outside the base model that hold parameters; none for a language model."""
    if model.get_output_embeddings() is not None or model.base_model is model:
        return ()
    children = model.named_children()
    return tuple(n for n, child in children if child is not model.base_model and any(True for _ in child.parameters()))


def prepare_saving(model: nn.Module, loads_best: bool) -> None:
    """Make an adapted model store itself in a form that can be read back. Any other module does so already."""
    if isinstance(model, PreTrainedModel):
        save_adapter_only(model)
    elif any(isinstance(module, PreTrainedModel) for module in model.modules()) and hasattr(model, "save"):
        if loads_best:
            raise TrainingError(f"{_NO_WAY_BACK} Unset `load_best_model_at_end` in the training arguments.")
        if "save" not in vars(model):
            save_merged_and_adapter(model)


def save_adapter_only(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained`, and so every Trainer checkpoint, write the adapter and the trained head.

    In a folder to resume from, `model.safetensors` holds them at full capacity under their own keys; every
    folder also is an adapter folder that PEFT and `load_adapter` read.
    """
    config = adapter_config(model)
    kept = _adapter_keys(model) | {f"{name}.lora_scaling" for name, _ in named_adapters(model)}
    kept |= {f"{name}.{key}" for name, module in saved_modules(model, config) for key in module.state_dict()}
    kept |= {name for name, _ in trained_biases(model, config)}
    model._keys_to_ignore_on_save = set(model.state_dict()) - kept
    model.save_pretrained = partial(_save_pretrained, model)


def save_merged_and_adapter(model: nn.Module) -> None:
    """Make `model.save` of a sentence-transformers model write merged weights, and the adapter in `adapter/`.

    The folder loads as SentenceTransformer(folder), which drops tensors that its base model does not know.
    """
    adapter = _adapter_keys(model)
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            own = {key.removeprefix(f"{name}.") for key in adapter if key.startswith(f"{name}.")}
            module._keys_to_ignore_on_save = set(module._keys_to_ignore_on_save or ()) | own
    model.save = partial(_save_merged_and_adapter, model)  # type: ignore[assignment]
    model.register_load_state_dict_pre_hook(_refuse_merged)  # type: ignore[no-untyped-call]


def _adapter_keys(model: nn.Module) -> set[str]:
    return {f"{name}.{part}" for name, _ in named_adapters(model) for part in ("lora_A", "lora_E", "lora_B")}


def _save_pretrained(model: PreTrainedModel, save_directory: str | Path, **kwargs: Any) -> None:
    if not is_adapted(model):  # ejected since: an ordinary model again
        del model.save_pretrained, model._keys_to_ignore_on_save
        model.save_pretrained(save_directory, **kwargs)
        return
    if kwargs.get("push_to_hub"):
        raise AdapterFileError("save_pretrained(push_to_hub=True) would push no adapter; call model.push_to_hub(name).")
    resumable = Path(save_directory).name.startswith(CHECKPOINT_PREFIX)
    if resumable:
        with unquantized_saving(model, forget=False):  # of a quantized base, nothing is stored
            type(model).save_pretrained(model, save_directory, **kwargs)
    save_adapter(model, save_directory, warn=not resumable)
    model.config.save_pretrained(save_directory)


def _save_merged_and_adapter(model: nn.Module, path: str | Path, *args: Any, **kwargs: Any) -> None:
    save: Any = type(model).save  # type: ignore[attr-defined]
    if not is_adapted(model):
        save(model, path, *args, **kwargs)
        return
    save_adapter(model, Path(path) / "adapter", warn=not Path(path).name.startswith(CHECKPOINT_PREFIX))
    merged = any(module.merged for _, module in named_adapters(model))
    merge(model)
    try:
        save(model, path, *args, **kwargs)
    finally:
        if not merged:
            unmerge(model)


def _refuse_merged(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
    if is_adapted(model) and not _adapter_keys(model) <= set(state):
        raise TrainingError(
            f"{_NO_WAY_BACK} To go on from it, load {'adapter/'!r} of that folder into the base model with "
            "adalora.load_adapter(model, folder, trainable=True) and train anew."
        )
