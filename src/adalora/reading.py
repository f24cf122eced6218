"""Reading an adapter folder with suspicion: every way in which a file can be wrong has its own message."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import AdaLoraConfig
from .conversion import adapter_type
from .errors import AdapterFileError, ConfigError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
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
        modules, state = dict(model.named_modules()), model.state_dict()
        for name, (A, _, B) in self.factors.items():
            if name not in modules:
                raise self.error(f"{name!r} is adapted, but {type(model).__name__} has no such module", other=True)
            kind = adapter_type(type(modules[name]))
            if kind is None or hasattr(modules[name], "lora_A"):
                reason = "has no adapter type" if kind is None else "is adapted already; call adalora.eject first"
                raise self.error(f"{name!r} ({type(modules[name]).__name__}) {reason}")
            shape = kind.shape_of(modules[name])
            if (B.shape[0], A.shape[1]) != shape:
                raise self.error(
                    f"{name!r} has an increment of shape {(B.shape[0], A.shape[1])}, the module needs {shape}",
                    other=True,
                )
        for name, value in self.whole.items():
            place = tuple(state[name].shape) if name in state else "no such tensor"
            if place != tuple(value.shape):
                raise self.error(f"{name!r} has shape {tuple(value.shape)}, the model has {place}", other=True)

    def error(self, what: str, other: bool = False) -> AdapterFileError:
        """An error about these files, with the remedy for an adapter of another model."""
        base = self.base_model_name_or_path
        remedy = f" It was made for {base!r}; load it into that model." if other and base else ""
        return AdapterFileError(f"adapter in {str(self.folder)!r}: {what}.{remedy}")


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read and check a folder in PEFT's AdaLoRA format. Raises AdapterFileError."""
    folder = Path(folder)
    text = _read_text(folder / CONFIG_FILE)
    values = _parse(text, folder)
    tensors, metadata = _read_tensors(folder / WEIGHTS_FILE)
    own = _own_metadata(metadata, values, folder)
    stored = StoredAdapter(folder, _config(values, own, folder), values.get("base_model_name_or_path"))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise stored.error(f"key {key!r} does not start with {PREFIX!r}")
        if not value.is_floating_point() or not value.isfinite().all():
            raise stored.error(f"key {key!r} ({value.dtype}) holds values that are not finite numbers")
        owner, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        if leaf in _PARTS:
            parts.setdefault(owner, {})[leaf] = value
        else:
            stored.whole[f"{owner.removesuffix('.base_layer')}.{leaf}"] = value
    pattern = values.get("rank_pattern") or {}
    for name, found in parts.items():
        stored.factors[name] = _factors(stored, name, found, pattern.get(f"{name}.lora_E"))
    if not stored.factors:
        raise stored.error("there is no key that ends in lora_A, lora_E or lora_B")
    return stored


def config_digest(values: dict[str, Any]) -> str:
    """SHA-256 of the entries of adapter_config.json that say what the tensors mean; names may be edited."""
    meaning = {key: values.get(key) for key in ("init_r", "lora_alpha", "rank_pattern", "bias", "modules_to_save")}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def _factors(
    stored: StoredAdapter, name: str, found: dict[str, Tensor], pattern: list[bool] | None
) -> tuple[Tensor, Tensor, Tensor]:
    missing = [part for part in _PARTS if part not in found]
    if missing:
        raise stored.error(f"key '{PREFIX}{name}.{missing[0]}' is missing")
    A, E, B = (found[part] for part in _PARTS)
    rank = E.shape[0]
    shapes = {part: tuple(found[part].shape) for part in _PARTS}
    if not (A.ndim == B.ndim == 2 and A.shape[0] == rank == B.shape[1] and tuple(E.shape) == (rank, 1)):
        raise stored.error(f"the shapes of {name!r} do not fit one rank: {shapes}; (k, in), (k, 1), (out, k) belong")
    expected = sum(map(bool, pattern)) if isinstance(pattern, list) else stored.config.init_r
    if rank != expected:
        raise stored.error(f"{name!r} has {rank} triplets, adapter_config.json says {expected}")
    return A, E, B


def _config(values: dict[str, Any], own: dict[str, Any], folder: Path) -> AdaLoraConfig:
    """Our own configuration if the file has it, else what PEFT's says. Training fields are not judged here:
    an adapter that PEFT stored without a schedule still computes."""
    names = ("lora_alpha", "lora_dropout", "init_r", "target_r", "bias", "modules_to_save", "target_modules")
    known = {name: values[name] for name in names if values.get(name) is not None}
    if known.get("lora_alpha", 1) <= 0:  # PEFT then scales by the rank at the start
        known["lora_alpha"] = float(known.get("init_r", 12))
    try:
        if "config" in own:
            return AdaLoraConfig.from_dict(own["config"])
        known["target_r"] = min(known.get("target_r", 8), known.get("init_r", 12))
        return AdaLoraConfig(**known)
    except ConfigError as error:
        raise AdapterFileError(f"adapter in {str(folder)!r}: {error}") from error


def _parse(text: str, folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        values = json.loads(text)
    except ValueError as error:
        raise AdapterFileError(f"{str(file)!r} is not valid JSON ({error}); restore it from a backup.") from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "ADALORA":
        raise AdapterFileError(
            f"{str(file)!r} says peft_type={kind!r}; only ADALORA folders can be loaded here. A LoRA belongs to "
            "peft.PeftModel.from_pretrained."
        )
    assert isinstance(values, dict)
    return values


def _own_metadata(metadata: dict[str, str], values: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        own = json.loads(metadata.get("adalora", "{}"))
    except ValueError as error:
        raise AdapterFileError(f"the metadata in {str(folder)!r} is damaged ({error}).") from error
    own = own if isinstance(own, dict) else {}
    if own.get("config_sha256", config_digest(values)) != config_digest(values):
        raise AdapterFileError(
            f"adapter_config.json and adapter_model.safetensors in {str(folder)!r} do not belong together: one was "
            "changed or replaced after saving. Restore both from one save."
        )
    return own


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
