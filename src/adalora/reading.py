"""Reading an adapter folder with suspicion: every way in which a file can be wrong has its own message."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import AdaLoraConfig
from .conversion import adapter_type
from .errors import AdapterFileError, ConfigError
from .layers import SVDAdapter
from .targets import refusal

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT's training settings, in groups that are valid together or not at all.
_TRAINING_FIELDS = (("beta1", "beta2"), ("orth_reg_weight",), ("tinit", "tfinal", "deltaT", "total_step"))
_PARTS = ("lora_A", "lora_E", "lora_B")


@dataclass
class StoredAdapter:
    """An adapter as its folder holds it: (A, E, B) by module, and whole tensors by base name."""

    folder: Path
    config: AdaLoraConfig
    base_model_name_or_path: str | None
    factors: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    def check_against(self, model: nn.Module) -> None:
        """Raise AdapterFileError unless every tensor has its place in `model`."""
        modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
        if any(isinstance(module, SVDAdapter) for module in modules.values()):
            raise self.error("the model is adapted already", "Call adalora.eject(model) first.")
        for name, (A, _, B) in self.factors.items():
            self._check_module(name, (B.shape[0], A.shape[1]), modules, model)
        for name, value in self.whole.items():
            place = f"shape {tuple(state[name].shape)}" if name in state else "no such tensor"
            if place != f"shape {tuple(value.shape)}":
                raise self.error(f"{name!r} has shape {tuple(value.shape)}, the model has {place}", self._other)
            if state[name].is_floating_point() != value.is_floating_point():
                raise self.error(f"{name!r} is {value.dtype}, the model has {state[name].dtype}", self._other)
        absent = [key for key in (*self.whole, *(f"{name}.weight" for name in self.factors)) if state[key].is_meta]
        if absent:
            raise self.error(f"{absent[0]!r} of the model is on the meta device", "Load the base weights first.")

    def _check_module(self, name: str, shape: tuple[int, int], modules: dict[str, nn.Module], model: nn.Module) -> None:
        if name not in modules:
            raise self.error(f"{name!r} is adapted, but {type(model).__name__} has no such module", self._other)
        reason = refusal(modules[name], modules[name.rpartition(".")[0]])
        if reason:
            raise self.error(f"{name!r} ({type(modules[name]).__name__}) cannot be adapted", reason)
        kind = adapter_type(type(modules[name]))
        assert kind is not None
        needed = kind.shape_of(modules[name])
        if shape != needed:
            raise self.error(f"{name!r} has an increment of shape {shape}, the module needs {needed}", self._other)

    @property
    def _other(self) -> str:
        base = self.base_model_name_or_path
        return f"It was made for {base!r}; load it into that model." if base else "It was made for another model."

    def error(self, what: str, remedy: str = "Restore both files from one save.") -> AdapterFileError:
        """An error about these files."""
        return AdapterFileError(f"adapter in {str(self.folder)!r}: {what}. {remedy}")


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read and check a folder in PEFT's AdaLoRA format. Raises AdapterFileError."""
    folder = Path(folder)
    text = _read_text(folder / CONFIG_FILE)
    values = _parse(text, folder)
    tensors, metadata = _read_tensors(folder / WEIGHTS_FILE)
    own = _own_metadata(metadata, values, tensors, folder)
    stored = StoredAdapter(folder, _config(values, own, folder), values.get("base_model_name_or_path"))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        _check_tensor(stored, key, value)
        owner, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        if leaf in _PARTS:
            parts.setdefault(owner, {})[leaf] = value
        elif not owner.endswith((".modules_to_save", ".original_module")):  # PEFT's copies, with bias="all"
            stored.whole[f"{owner.removesuffix('.base_layer')}.{leaf}"] = value
    pattern = _rank_pattern(stored, values)
    for name, found in parts.items():
        stored.factors[name] = _factors(stored, name, found, pattern.pop(f"{name}.lora_E", None))
    if not stored.factors:
        raise stored.error("there is no key that ends in lora_A, lora_E or lora_B")
    if pattern:
        raise stored.error(f"rank_pattern names {next(iter(pattern))!r}, which {WEIGHTS_FILE} does not hold")
    return stored


def config_digest(values: dict[str, Any], own: object) -> str:
    """SHA-256 of our configuration and of what adapter_config.json says about the tensors; names may be edited."""
    meaning = {key: values.get(key) for key in ("init_r", "lora_alpha", "rank_pattern", "bias", "modules_to_save")}
    return hashlib.sha256(json.dumps([meaning, own], sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU: safetensors has no checksum of its own."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(ctypes.string_at(value.data_ptr(), value.nbytes))
    return total.hexdigest()


def _check_tensor(stored: StoredAdapter, key: str, value: Tensor) -> None:
    if not key.startswith(PREFIX):
        raise stored.error(f"key {key!r} does not start with {PREFIX!r}")
    if key.rpartition(".")[2] in _PARTS and not value.is_floating_point():
        raise stored.error(f"key {key!r} is {value.dtype}; a floating point type belongs there")
    if value.is_floating_point() and not value.double().isfinite().all():
        raise stored.error(f"key {key!r} ({value.dtype}) holds values that are not finite numbers")


def _rank_pattern(stored: StoredAdapter, values: dict[str, Any]) -> dict[str, list[bool]]:
    pattern, size = values.get("rank_pattern"), stored.config.init_r
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise stored.error(f"rank_pattern is a {type(pattern).__name__}; lists of booleans by module belong there")
    for key, keep in pattern.items():
        if not isinstance(keep, list) or len(keep) != size or not all(isinstance(entry, bool) for entry in keep):
            raise stored.error(f"rank_pattern[{key!r}] is not a list of {size} booleans (init_r)")
    return dict(pattern)


def _factors(
    stored: StoredAdapter, name: str, found: dict[str, Tensor], keep: list[bool] | None
) -> tuple[Tensor, Tensor, Tensor]:
    missing = [part for part in _PARTS if part not in found]
    if missing:
        raise stored.error(f"key '{PREFIX}{name}.{missing[0]}' is missing")
    A, E, B = (found[part] for part in _PARTS)
    shapes = {part: tuple(found[part].shape) for part in _PARTS}
    if not (A.ndim == B.ndim == 2 and tuple(E.shape) == (A.shape[0], 1) and B.shape[1] == A.shape[0]):
        raise stored.error(f"the shapes of {name!r} do not fit one rank: {shapes}; (k, in), (k, 1), (out, k) belong")
    rank, expected = A.shape[0], stored.config.init_r if keep is None else sum(keep)
    if rank != expected:
        raise stored.error(f"{name!r} has {rank} triplets, adapter_config.json says {expected}")
    return A, E, B


def _config(values: dict[str, Any], own: dict[str, Any], folder: Path) -> AdaLoraConfig:
    """Our own configuration if the file has it, else what PEFT's says.

    What concerns training is taken where it is valid and otherwise left at its default: an adapter that PEFT
    stored without a schedule still computes.
    """
    names = ("lora_alpha", "lora_dropout", "init_r", "target_r", "bias", "modules_to_save", "target_modules")
    known = {name: values[name] for name in names if values.get(name) is not None}
    alpha, rank, target = known.get("lora_alpha"), known.get("init_r", 12), known.get("target_r", 8)
    if isinstance(alpha, int | float) and alpha <= 0:  # PEFT then scales by the rank at the start
        known["lora_alpha"] = rank
    if isinstance(rank, int) and isinstance(target, int):
        known["target_r"] = max(0, min(rank, target))
    try:
        config = AdaLoraConfig.from_dict(own["config"]) if "config" in own else AdaLoraConfig(**known)
    except ConfigError as error:
        raise AdapterFileError(f"adapter in {str(folder)!r}: {error}") from error
    for fields in () if "config" in own else _TRAINING_FIELDS:
        with contextlib.suppress(ConfigError):
            config = dataclasses.replace(config, **{field: values[field] for field in fields if field in values})
    return config


def _parse(text: str, folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{str(file)!r} is not valid JSON ({error}); restore it from a backup.") from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "ADALORA":
        raise AdapterFileError(
            f"{str(file)!r} says peft_type={kind!r}; only ADALORA folders can be loaded here. A LoRA belongs to "
            "peft.PeftModel.from_pretrained."
        )
    assert isinstance(values, dict)
    return values


def _own_metadata(
    metadata: dict[str, str], values: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> dict[str, Any]:
    if "adalora" not in metadata:
        return {}
    try:
        own = json.loads(metadata["adalora"])
        config, digests = own["config"], (own["config_sha256"], own["tensors_sha256"])
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise AdapterFileError(
            f"the metadata of {str(folder / WEIGHTS_FILE)!r} is damaged ({error!r}). Restore it from a copy."
        ) from error
    if digests[1] != tensors_digest(tensors):
        raise AdapterFileError(
            f"the tensors in {str(folder / WEIGHTS_FILE)!r} are not those that were saved: their checksum differs. "
            "Restore the file from a copy."
        )
    if digests[0] != config_digest(values, config):
        raise AdapterFileError(
            f"adapter_config.json and adapter_model.safetensors in {str(folder)!r} do not belong together: one was "
            "changed or replaced after saving. Restore both from one save."
        )
    return {"config": config}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(
            f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}. An adapter folder holds "
            "adapter_config.json and adapter_model.safetensors."
        ) from error


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        hint = " Pickle files (.bin) are never read." if path.with_suffix(".bin").exists() else ""
        raise AdapterFileError(f"cannot read {str(path)!r}: {error}. It is missing or damaged.{hint}") from error
