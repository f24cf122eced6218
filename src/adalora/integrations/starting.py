"""The start from data of an adapted model in a Trainer, on rows that the run's seed draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from ..config import AdaLoraConfig
from ..errors import TrainingError
from ..injection import adapter_root, named_adapters
from ..pending import pending_start
from ..start import PASSES, activation_start_, gradient_start_

START_STEPS = 8  # optimizer steps whose number of rows a start sees


def start_from_rows_(model: nn.Module, loader: Any, args: Any, size: int | None) -> None:
    """Make the start that an adapted `model` waits for, on rows of the Trainer's `loader`, if it waits for one.

    As many rows as START_STEPS optimizer steps see, drawn by the run's seed in an order of their own, in batches of no
    more than `size`. The loader is not read, and Python's, NumPy's and torch's generators are as before. Raises
    TrainingError where that cannot be.
    """
    kind = pending_start(adapter_root(model))
    if kind is None:
        return
    device = next(model.parameters()).device
    with _same_draws():
        batches = _batches(loader, args, size, kind)
        if kind == "gradient":
            gradient_start_(model, batches, lambda model, batch: _loss(model, batch, device), seed=args.seed)
        else:
            activation_start_(model, batches, lambda model, batch: _run(model, batch, device, kind), seed=args.seed)
    _share(model)


def describe_start(config: AdaLoraConfig, rows: int) -> str | None:
    """In words, for a plan, with the `rows` of an optimizer step; None where nothing is taken from data."""
    if config.init_lora_weights not in ("gradient", "activation"):
        return None
    number, what = (PASSES, "gradients") if config.init_lora_weights == "gradient" else (PASSES + 1, "activations")
    return f"directions from the {what} of {START_STEPS * rows:,} rows, in {number} passes before the first step"


def _batches(loader: Any, args: Any, size: int | None, kind: str) -> list[Any]:
    rows = loader.dataset
    if not (isinstance(rows, Sized) and hasattr(rows, "__getitem__")):
        raise TrainingError(
            f"init_lora_weights={kind!r} wants rows before training, and {type(rows).__name__} gives each of its rows "
            f"only in turn. {_by_hand(kind)}"
        )
    whole = args.per_device_train_batch_size
    draw = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    chosen, step = draw[: START_STEPS * args.gradient_accumulation_steps * whole].tolist(), min(size or whole, whole)
    return [loader.collate_fn([rows[i] for i in chosen[at : at + step]]) for at in range(0, len(chosen), step)]


def _loss(model: nn.Module, batch: Any, device: torch.device) -> Tensor:
    output = _run(model, batch, device, "gradient")
    loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise TrainingError(
            f"init_lora_weights='gradient' needs a loss, and {type(model).__name__} returned none for a batch of the "
            f"Trainer's. {_by_hand('gradient')}"
        )
    return loss.mean()


def _run(model: nn.Module, batch: Any, device: torch.device, kind: str) -> Any:
    if not isinstance(batch, Mapping):
        raise TrainingError(
            f"init_lora_weights={kind!r} needs batches that are dicts, and the Trainer's are {type(batch).__name__}. "
            f"{_by_hand(kind)}"
        )
    return model(**{name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()})


def _by_hand(kind: str) -> str:
    return (
        f"Call adalora.start.{kind}_start_(trainer.model, batches, …) between Trainer(…) and train(), or choose "
        "init_lora_weights='orthogonal'."
    )


def _share(model: nn.Module) -> None:
    """Give all processes the directions of the first: theirs come of the same rows, but by sums in another order."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        with torch.no_grad():
            for _, module in named_adapters(model):
                distributed.broadcast(module.lora_A.detach(), 0)
                distributed.broadcast(module.lora_B.detach(), 0)


@contextmanager
def _same_draws() -> Iterator[None]:
    """Leave the generators that collators and datasets draw from as they are."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    try:
        yield
    finally:
        for restore, state in states:
            restore(state)
