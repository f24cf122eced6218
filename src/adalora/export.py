"""Leaving AdaLoRA: a plain LoRA folder that every server reads. Merged weights are in `whole`.

For LoRA the scale and Λ go into B, so that every reader's convention gives scale 1. Ragged: each module has
its own rank (`rank_pattern` equal to `alpha_pattern`), modules of rank 0 are left out. Padded: one rank for all.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checkpoint import base_key, base_name, exact_targets
from .errors import AdapterFileError
from .files import staged
from .gathering import in_one_process
from .injection import adapter_config, adapter_root, named_adapters
from .layers import SVDAdapter, SVDConv, SVDEmbedding
from .reading import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from .stored import acting_factors, check_finite, increment, probe, warn_if_unfinished, whole_tensors

logger = logging.getLogger("adalora")

# B·E rounds once to fp32 where the live adapter multiplies later; what remains is below this, relative.
TOLERANCE = 1e-6


def export_lora(
    model: nn.Module,
    folder: str | Path,
    *,
    padded: bool | int = False,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> float:
    """Write `model`'s adapter as a PEFT LoRA; atomically. `padded`: every module has the largest rank, or that number.

    Returns the largest difference between the increments read back and the live ones, relative to the largest live
    one. Every process calls this for a sharded model. Raises AdapterFileError for a convolution that PEFT's LoRA cannot
    express, for an adapter without any live triplet, and for a `padded` below the largest rank.
    """
    warn_if_unfinished(model)
    root = adapter_root(model)
    base = base_model_name_or_path or base_name(root)
    return in_one_process(root, lambda: _write_lora(root, folder, padded, base, task_type))


def _write_lora(root: nn.Module, folder: str | Path, padded: bool | int, base: str | None, task: str | None) -> float:
    modules = dict(named_adapters(root))
    factors = {name: _folded(module) for name, module in modules.items()}
    ranks = _stored_ranks({name: A.shape[0] for name, (A, _) in factors.items()}, padded)
    tensors: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        tensors |= _lora_tensors(name, modules[name], *_pad(*factors[name], rank))
    for name, value in whole_tensors(root):
        tensors[PREFIX + base_key(name, {key: modules[key] for key in ranks})] = value
    expand = {name: _groups(modules[name]) for name in ranks}  # see _lora_tensors
    ranks = {name: rank * expand[name] for name, rank in ranks.items()}
    text = json.dumps(_lora_config(root, ranks, base, task), indent=2, sort_keys=True) + "\n"
    check_finite(tensors)
    with staged(folder) as staging:
        save_file(tensors, staging / WEIGHTS_FILE, {"format": "pt"})
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
        return _check_lora(modules, staging, folder)


def _stored_ranks(ranks: dict[str, int], padded: bool | int) -> dict[str, int]:
    """The rank of each module in the file; those that are in it at all."""
    largest = max(ranks.values(), default=0)
    if not largest:
        raise AdapterFileError(
            "no triplet of this adapter is live, and LoRA has no rank 0; there is nothing to export."
        )
    if padded:
        size = largest if padded is True else padded
        if size < largest:
            raise AdapterFileError(f"padded={size} is below the largest rank, {largest}; use at least that.")
        ranks = dict.fromkeys(ranks, size)
    return {name: rank for name, rank in ranks.items() if rank}


def _folded(module: SVDAdapter) -> tuple[Tensor, Tensor]:
    """A (k, in) and B·diag(s·E) (out, k) of the live triplets."""
    A, E, B = acting_factors(module)
    return A, B * (E.T * module.scaling)


def _pad(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - A.shape[0]
    return torch.cat([A, A.new_zeros(more, A.shape[1])]), torch.cat([B, B.new_zeros(B.shape[0], more)], dim=1)


def _groups(module: SVDAdapter) -> int:
    return module.groups if isinstance(module, SVDConv) else 1


def _lora_tensors(name: str, module: SVDAdapter, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    key = PREFIX + name
    if isinstance(module, SVDEmbedding):
        return {f"{key}.lora_embedding_A": A.contiguous(), f"{key}.lora_embedding_B": B.contiguous()}
    if isinstance(module, SVDConv):
        _refuse_geometry(name, module)
        kernel, groups = module.weight.shape[1:], module.groups
        # PEFT's A sees all input channels and its B is grouped: each group gets its own copy of the rows of
        # A, zero outside the group, which multiplies the rank by the number of groups.
        wide = A.new_zeros(groups, A.shape[0], groups, *kernel)
        for group in range(groups):
            wide[group, :, group] = A.view(-1, *kernel)
        A = wide.reshape(groups * A.shape[0], groups * kernel[0], *kernel[1:])
        B = B.reshape(*B.shape, *(1,) * (len(kernel) - 1))
    return {f"{key}.lora_A.weight": A.contiguous(), f"{key}.lora_B.weight": B.contiguous()}


def _refuse_geometry(name: str, module: SVDConv) -> None:
    dilation, mode = getattr(module, "dilation", (1,)), getattr(module, "padding_mode", "zeros")
    if any(step != 1 for step in dilation) or mode != "zeros":
        raise AdapterFileError(
            f"{name!r} is a convolution with dilation={dilation} and padding_mode={mode!r}, which PEFT's LoRA leaves "
            "out; use adalora.export_merged or save_adapter."
        )


def _lora_config(root: nn.Module, ranks: dict[str, int], base: str | None, task_type: str | None) -> dict[str, Any]:
    config, largest = adapter_config(root), max(ranks.values())
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != largest}
    conv1d = any(type(module).base_type.__name__ == "Conv1D" for _, module in named_adapters(root))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "inference_mode": True,
        "base_model_name_or_path": base,
        "target_modules": exact_targets(root, ranks),
        "modules_to_save": list(config.modules_to_save) if config.modules_to_save else None,
        "bias": config.bias,
        "fan_in_fan_out": conv1d,
        "lora_dropout": config.lora_dropout,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
    }


def _check_lora(modules: dict[str, SVDAdapter], staging: Path, folder: str | Path) -> float:
    """Compare on probes; a module that is absent from the file computes 0."""
    stored, worst, largest = load_file(staging / WEIGHTS_FILE), 0.0, 0.0
    for name, module in modules.items():
        x, (A, E, B) = probe(module), acting_factors(module)
        live = increment(x, (A, E, B), module.scaling)
        key, embedding = PREFIX + name, isinstance(module, SVDEmbedding)
        parts = [f"{key}.lora_embedding_{p}" if embedding else f"{key}.lora_{p}.weight" for p in "AB"]
        read = torch.zeros_like(live)
        if parts[0] in stored:
            down, up = stored[parts[0]], stored[parts[1]].flatten(1)
            if isinstance(module, SVDConv):
                down = down[: up.shape[1], : module.weight.shape[1]].flatten(1)  # the first group's rows
            read = x @ down.T @ up.T
        worst, largest = max(worst, float((read - live).abs().max())), max(largest, float(live.abs().max()))
    return _verdict(worst, largest, folder)


def _verdict(worst: float, largest: float, folder: str | Path) -> float:
    relative = worst / largest if largest else worst
    logger.info("reload check of %s: max difference %.1e of the largest increment", folder, relative)
    if relative > TOLERANCE:
        raise AdapterFileError(f"the adapter read back from {str(folder)!r} differs by {relative:.3e}; do not use it.")
    return relative
