"""Whether an adapted model still waits for a start from data, which its configuration asked for."""

from __future__ import annotations

from torch import nn

from .config import Start
from .errors import TrainingError

_PENDING = "adalora_start_pending"  # where an adapted model notes it


def expect_start(root: nn.Module, start: Start) -> None:
    """Note that directions are to come, if `start` takes them from data."""
    if start in ("gradient", "activation"):
        setattr(root, _PENDING, start)


def pending_start(root: nn.Module) -> str | None:
    """ "gradient" or "activation" if the directions of an adapted model are still to be taken from data."""
    kind: str | None = vars(root).get(_PENDING)
    return kind


def start_made(root: nn.Module, kind: str | None = None) -> None:
    """Note that its directions are those to train from, if it was this kind that it waited for."""
    if kind in (None, pending_start(root)):
        vars(root).pop(_PENDING, None)


def require_start(root: nn.Module) -> None:
    """Raise TrainingError if the configuration asks for a start from data that was not made."""
    kind = pending_start(root)
    if kind is not None:
        call = f"adalora.start.{kind}_start_(model, batches, {'loss_of' if kind == 'gradient' else 'forward'})"
        raise TrainingError(
            f"init_lora_weights={kind!r} asks for directions from data, and the adapter still has random ones. Call "
            f"{call} with a few batches before the first step (in a transformers Trainer AdaLoraCallback does it), or "
            "choose init_lora_weights='orthogonal'."
        )
