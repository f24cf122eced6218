"""Leaving AdaLoRA: the base model with every increment in its weights, as a folder like any other."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import AdapterFileError, InjectionError
from .files import staged
from .gathering import refuse_sharded
from .injection import adapter_root, named_adapters
from .layers import SVDAdapter
from .merging import float_type, merge, unmerge
from .quantized import Into, dequantized, from_conv1d, is_quantized, library_of
from .quantizedmodels import dequantized_state, unquantized_saving
from .stored import check_finite, warn_if_unfinished

logger = logging.getLogger("adalora")


def export_merged(model: nn.Module, folder: str | Path, *, quantized: Into | None = None) -> float:
    """Write the base model with every increment added to its weight; atomically. The model itself is unchanged.

    A transformers model is written by its own save_pretrained, any other as `model.safetensors`. A quantized base is
    written in floating point (`quantized="dequantize"`), or in its own few bits ("requantize"); see `merge`, which
    also says what that costs. Returns the largest difference between a weight read back and W + s·ΔW in the adapter's
    precision, relative to the largest increment: the rounding to what is written.
    """
    warn_if_unfinished(model)
    root = adapter_root(model)
    refuse_sharded(root, "no process holds its weights", "save the adapter, and export from one process")
    if any(module.merged for _, module in named_adapters(root)):
        raise InjectionError("the adapter is merged already; call adalora.unmerge(model) before exporting.")
    with torch.no_grad():
        wanted = {name: (_weight(module) + module.delta_weight()).cpu() for name, module in named_adapters(root)}
    check_finite({f"{name}.weight": value for name, value in wanted.items()})
    merge(root, quantized=quantized)
    try:
        own = {f"{name}.{part}" for name, _ in named_adapters(root) for part in ("lora_A", "lora_E", "lora_B")}
        state = {key: value for key, value in root.state_dict().items() if key not in own}
        if quantized == "dequantize":
            state = dequantized_state(root, state, float_type(root))
        with staged(folder) as staging:
            if hasattr(root, "base_model_prefix"):  # others have a save_pretrained too, but not this one
                _save_pretrained(root, staging, state, plain=quantized == "dequantize")
            else:
                save_file(_unshared(state), staging / "model.safetensors", {"format": "pt"})
            relative = _check_merged(root, wanted, staging)
            _refuse_stale(staging, Path(folder))
    finally:
        unmerge(root)
    logger.info("reload check of %s: max difference %.1e of the largest increment", folder, relative)
    return relative


def _weight(module: SVDAdapter) -> Tensor:
    return dequantized(module) if is_quantized(module) else module.weight.to(module.lora_A.dtype)


def _save_pretrained(root: nn.Module, folder: Path, state: dict[str, Tensor], plain: bool) -> None:
    # An integration may have narrowed the instance to its adapter; the class still writes everything.
    narrowed = vars(root).pop("_keys_to_ignore_on_save", None)
    try:
        with unquantized_saving(root, forget=True) if plain else nullcontext():
            type(root).save_pretrained(root, folder, state_dict=state)  # type: ignore[attr-defined]
    finally:
        if narrowed is not None:
            setattr(root, "_keys_to_ignore_on_save", narrowed)  # noqa: B010


def _refuse_stale(staging: Path, folder: Path) -> None:
    """Weights of another model, or of more shards, that would stay beside the new ones and be loaded with them."""
    stale = {file.name for file in folder.glob("*.safetensors")} - {file.name for file in staging.iterdir()}
    if stale:
        raise AdapterFileError(
            f"{str(folder)!r} holds {sorted(stale)[0]!r} already, which a reader could take for a part of this model; "
            "remove it, or choose another folder."
        )


def _check_merged(root: nn.Module, wanted: dict[str, Tensor], folder: Path) -> float:
    worst, largest = 0.0, 0.0
    left = dict(named_adapters(root))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            keys = set(weights.keys())
            for name, module in list(left.items()):
                key = f"{name}._weight_qdata" if library_of(module) == "torchao" else f"{name}.weight"
                if key not in keys:
                    continue
                read = _read_back(module, weights.get_tensor(key)).to(wanted[name].dtype)
                worst = max(worst, float((read - wanted[name]).abs().max()))
                largest = max(largest, float(module.delta_weight().detach().abs().max()))
                del left[name]
    if left:
        raise AdapterFileError(f"the model's save_pretrained leaves out '{min(left)}.weight'; nothing was written.")
    return worst / largest if largest else worst


def _read_back(module: SVDAdapter, stored: Tensor) -> Tensor:
    """W + s·ΔW as a file holds it, on the CPU; inf where the bits of a quantized one are not those of the model."""
    if not is_quantized(module):
        return stored.T if from_conv1d(module) else stored
    held = getattr(module.weight, "qdata", module.weight.data).cpu()
    return dequantized(module).cpu() if torch.equal(held, stored) else torch.full(module.shape, torch.inf)


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One entry for each storage: the file format refuses tied tensors."""
    first = {(value.data_ptr(), value.shape): key for key, value in reversed(state.items())}
    return {key: state[key].contiguous() for key in state if key in first.values()}
