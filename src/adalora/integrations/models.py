"""What is asked of a transformers model before it is adapted: whether it is already, and which is its task head."""

from __future__ import annotations

import dataclasses

from torch import nn
from transformers import PreTrainedModel

from ..config import AdaLoraConfig
from ..errors import InjectionError
from ..injection import adapter_root


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
