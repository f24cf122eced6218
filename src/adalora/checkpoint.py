"""The adapter folder: PEFT's AdaLoRA format, written and read without PEFT.

`adapter_config.json` and `adapter_model.safetensors`; PEFT loads ours and we load PEFT's. What PEFT has no
field for (our whole configuration) stands in the metadata of the tensor file, together with a digest of the
meaning of the JSON file and one of the tensors, so that a damaged file, or two files which do not belong
together, are noticed.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import AdaLoraConfig
from .errors import AdapterFileError
from .files import staged
from .gathering import in_one_process
from .injection import adapter_config, adapter_root, install, named_adapters, training_progress, uncompiled
from .layers import SVDAdapter
from .reading import CONFIG_FILE, PREFIX, WEIGHTS_FILE, StoredAdapter, config_digest, read_adapter, tensors_digest
from .schedule import Schedule
from .stored import acting, acting_factors, check_finite, increment, probe, warn_if_unfinished, whole_tensors

logger = logging.getLogger("adalora")


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    warn: bool = True,
) -> float:
    """Write the adapter of `model`, and what trained with it, to `folder`; atomically.

    Of a sharded model every process calls this, and the first writes. Returns the largest difference between the
    increments read back and the live ones, which is 0. Without
    `base_model_name_or_path` a transformers model names itself. Warns if the allocator never ran or the
    budget is not met; a checkpoint taken during training asks for no `warn`. Raises AdapterFileError, also
    for an adapter with values that are not finite.
    """
    if warn:
        warn_if_unfinished(model)
    root = adapter_root(model)
    base = base_model_name_or_path or base_name(root)
    return in_one_process(root, lambda: _write(root, folder, base, task_type))


def _write(root: nn.Module, folder: str | Path, base: str | None, task_type: str | None) -> float:
    config = _peft_config(root, base, task_type)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    tensors: dict[str, Tensor] = {}
    for name, module in named_adapters(root):
        for key, factor in zip(("lora_A", "lora_E", "lora_B"), acting_factors(module), strict=True):
            tensors[f"{PREFIX}{name}.{key}"] = factor
    modules = dict(named_adapters(root))
    for name, value in whole_tensors(root):
        tensors[PREFIX + base_key(name, modules)] = value
    check_finite(tensors)
    own = adapter_config(root).to_dict()
    digests = {"config_sha256": config_digest(config, own), "tensors_sha256": tensors_digest(tensors)}
    metadata = {"format": "pt", "adalora": json.dumps({"config": own} | digests, sort_keys=True)}
    with staged(folder) as staging:
        save_file(tensors, staging / WEIGHTS_FILE, metadata)
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
        return _check(root, read_adapter(staging), folder)


def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> nn.Module:
    """Put the adapter in `folder`, ours or PEFT's AdaLoRA, into the base model `model`; returns the model.

    Layers are built at the stored ranks. `trainable` leaves adapters and saved modules ready to train on, for a
    run of any length: `total_step` is unset, and phases in steps become fractions of the run that is over.
    Raises AdapterFileError, naming file, key and shapes, and leaves the model as it was.
    """
    _load(uncompiled(model), read_adapter(folder), trainable)
    return model


def _load(model: nn.Module, stored: StoredAdapter, trainable: bool) -> None:
    stored.check_against(model)
    config = _for_another_run(stored.config) if trainable else stored.config
    install(model, config, {name: factors[1].shape[0] for name, factors in stored.factors.items()})
    if not trainable:
        model.requires_grad_(False)
    with torch.no_grad():
        for name, module in named_adapters(model):
            for parameter, value in zip(
                (module.lora_A, module.lora_E, module.lora_B), stored.factors[name], strict=True
            ):
                parameter.copy_(value)
        state = model.state_dict(keep_vars=True)
        for name, value in stored.whole.items():
            state[name].copy_(value)


def _for_another_run(config: AdaLoraConfig) -> AdaLoraConfig:
    if config.total_step is None and any(isinstance(phase, int) for phase in (config.tinit, config.tfinal)):
        logger.warning(
            "the phases tinit=%s and tfinal=%s are steps of a run whose length the adapter does not tell; training it "
            "again uses the default fractions",
            config.tinit,
            config.tfinal,
        )
    return config.for_another_run()


def base_name(model: nn.Module) -> str | None:
    """The name that a transformers model was loaded by, if it is one."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None


def base_key(name: str, modules: dict[str, SVDAdapter]) -> str:
    """The key of a base tensor in a PEFT file: its wrappers put the bias of an adapted module one level down."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.base_layer.{leaf}" if owner in modules else name


def exact_targets(root: nn.Module, names: Collection[str]) -> list[str] | str:
    """`target_modules` for PEFT that mean these modules alone; entries of a list mean other names that end so too."""
    others = {name for name, _ in root.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(map(re.escape, names))
    return list(names)


def _peft_config(root: nn.Module, base: str | None, task_type: str | None) -> dict[str, Any]:
    config, modules = adapter_config(root), dict(named_adapters(root))
    pattern = {f"{name}.lora_E": acting(module).tolist() for name, module in modules.items()}
    for keep in pattern.values():
        keep.extend([False] * (config.init_r - len(keep)))
    common = {
        "peft_type": "ADALORA",
        "task_type": task_type,
        "inference_mode": True,
        "base_model_name_or_path": base,
        "target_modules": exact_targets(root, modules),
        "modules_to_save": list(config.modules_to_save) if config.modules_to_save else None,
        "bias": config.bias,
        "fan_in_fan_out": any(type(module).base_type.__name__ == "Conv1D" for module in modules.values()),
        "rank_pattern": None if all(all(keep) for keep in pattern.values()) else pattern,
    }
    fields = ("init_r", "target_r", "lora_alpha", "lora_dropout", "beta1", "beta2", "orth_reg_weight")
    return common | {field: getattr(config, field) for field in fields} | _schedule_fields(config, root)


def _schedule_fields(config: AdaLoraConfig, root: nn.Module) -> dict[str, int]:
    total = training_progress(root).total_step
    if total is None:  # PEFT demands a schedule even where nothing will train
        return {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
    schedule = Schedule.from_config(config, 1, 0, total)
    return {name: getattr(schedule, name) for name in ("tinit", "tfinal", "deltaT", "total_step")}


def _check(root: nn.Module, stored: StoredAdapter, folder: str | Path) -> float:
    worst = 0.0
    for name, module in named_adapters(root):
        x, scaling = probe(module), stored.config.scaling
        live = increment(x, acting_factors(module), module.scaling)
        worst = max(worst, float((increment(x, stored.factors[name], scaling) - live).abs().max()))
    for name, value in whole_tensors(root):
        worst = max(worst, float((stored.whole[name] - value).abs().max()) if value.numel() else 0.0)
    logger.info("reload check of %s: max difference %.1e", folder, worst)
    if worst != 0.0:
        raise AdapterFileError(
            f"the adapter read back from {str(folder)!r} differs from the one written by {worst:.3e}; the disk or "
            "file system is damaging files. Save elsewhere."
        )
    return worst
