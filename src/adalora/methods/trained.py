"""Storing what trains in a base model that keeps its own names: for methods that PEFT has no format for.

`adapter_model.safetensors` holds the tensors by their names in the model, `adapter_config.json` the method as
`peft_type`, so that whoever expects another kind of adapter says what it found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import AdaLoraConfig
from ..errors import AdapterFileError
from ..files import write_files
from ..jsonfiles import read_object
from ..reading import CONFIG_FILE, WEIGHTS_FILE
from ..stored import check_finite
from ..targets import saved_modules
from .options import with_head


def head_modules(model: nn.Module, names: Any = None) -> list[str]:
    """The modules that train whole: those that `modules_to_save` names, by default the task head."""
    config = with_head(model, AdaLoraConfig(modules_to_save=names))
    return [name for name, _ in saved_modules(model, config)]


def train_only(model: nn.Module, names: set[str], heads: list[str]) -> None:
    """Freeze all but the parameters `names` and the modules `heads`; checkpoints hold nothing else either."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or _within(name, heads))
    if isinstance(model, PreTrainedModel):
        model._keys_to_ignore_on_save = set(model.state_dict()) - _kept(model, heads)


def write_trained(model: nn.Module, folder: Path, method: str, heads: list[str], facts: Mapping[str, Any]) -> None:
    """Store what trains in `model`, and the modules `heads` whole. Raises AdapterFileError."""
    state = model.state_dict()
    tensors = {name: state[name].detach().cpu().clone().contiguous() for name in sorted(_kept(model, heads))}
    check_finite(tensors)
    config = {"peft_type": method.upper(), "inference_mode": True, "modules_to_save": heads, **facts}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_files(
        folder,
        {
            WEIGHTS_FILE: lambda path: save_file(tensors, path, {"format": "pt"}),
            CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
        },
    )


def read_trained(folder: Path, method: str) -> dict[str, Tensor]:
    """The tensors in `folder` by name. Raises AdapterFileError if they are not of this method."""
    kind = read_object(folder / CONFIG_FILE).get("peft_type")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"cannot read the adapter in {str(folder)!r}: {error}. Restore it from a copy."
        ) from error
    if kind != method.upper():
        raise AdapterFileError(
            f"{str(folder)!r} says peft_type={kind!r}, not {method.upper()!r}; load it by its own method."
        )
    check_read(tensors, folder / WEIGHTS_FILE)
    return tensors


def check_read(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise AdapterFileError if a tensor of `file` holds NaN or infinity."""
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise AdapterFileError(
                f"{str(file)!r}: {key!r} holds values that are not finite numbers: the training diverged, or the file "
                "is damaged. Restore it from a copy, or train again with a lower learning rate."
            )


@contextmanager
def undone(base: nn.Module) -> Iterator[None]:
    """Give `base` back the modules, hooks and attributes that it had if what is built around them fails half-way."""
    parts = [
        (vars(module), {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in found})
        for module, found in ((module, list(vars(module).items())) for module in base.modules())
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield
    except BaseException:
        for own, before in parts:
            own.clear()
            for name, (value, content) in before.items():
                own[name] = value
                if content is not None:
                    value.clear()
                    value.update(content)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        raise


def put_in(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """Copy `tensors` to their places in `model`, frozen. Raises AdapterFileError before anything is changed."""
    state = model.state_dict(keep_vars=True)
    for name, value in tensors.items():
        place = f"shape {tuple(state[name].shape)}" if name in state else "no such tensor"
        if place != f"shape {tuple(value.shape)}":
            raise AdapterFileError(
                f"adapter in {str(folder)!r}: {name!r} has shape {tuple(value.shape)}, the model has {place}. It was "
                "made for another model."
            )
    with torch.no_grad():
        for name, value in tensors.items():
            state[name].copy_(value)
    return model.requires_grad_(False)


def trained_count(model: nn.Module, heads: list[str]) -> tuple[int, int]:
    """Trained parameters outside and inside the modules `heads`."""
    sizes = [(p.numel(), _within(name, heads)) for name, p in model.named_parameters() if p.requires_grad]
    return sum(size for size, inside in sizes if not inside), sum(size for size, inside in sizes if inside)


def _kept(model: nn.Module, heads: list[str]) -> set[str]:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name for name in model.state_dict() if _within(name, heads)}


def _within(name: str, heads: list[str]) -> bool:
    return any(name.startswith(f"{head}.") for head in heads)
