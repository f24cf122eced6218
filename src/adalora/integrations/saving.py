"""The form in which an adapted model stores itself when a Trainer saves it.

Checkpoints shrink to adapter and trained head by transformers' own mechanism for keys that need no saving, which is
also what makes them load again. A sentence-transformers model cannot load a part of itself: its folders hold merged
weights and, in `adapter/`, the adapter.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import save_adapter
from ..errors import AdapterFileError, TrainingError
from ..injection import adapter_config, named_adapters, trained_biases
from ..merging import merge, unmerge
from ..quantizedmodels import unquantized_saving
from ..targets import saved_modules
from .models import is_adapted

CHECKPOINT_PREFIX = "checkpoint-"  # of the folders from which a Trainer resumes

_NO_WAY_BACK = (
    "checkpoints of a sentence-transformers model hold merged weights, which its trainer cannot load back into an "
    "adapted model."
)


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
