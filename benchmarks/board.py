"""What all victims share: runs of a second or less that are made to be killed.

Each goes on from what an earlier process left in its folder, tells on a `Board` where it is, and leaves everything that
training made in `final.pt`: adapter, masks, averages, optimizer and metrics.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adalora.files import write_files
from adalora.injection import named_adapters

STEPS, MICRO = 32, 2  # optimizer steps, and micro-batches in each
SCHEDULE: dict[str, Any] = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "tinit": 6, "tfinal": 12, "deltaT": 3}
FINAL = "final.pt"


class Board:
    """What a run tells the process that will kill it, in memory that both see: how far it is, and whether it writes."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def tell(self, place: int, writing: bool = False) -> None:
        """`place` micro-batches are behind the run."""
        self._memory[:8] = struct.pack("ii", place, writing)

    def look(self) -> tuple[int, bool]:
        """What was told last."""
        place, writing = struct.unpack("ii", self._memory[:8])
        return place, bool(writing)


Victim = Callable[[Path, Board], None]


def end(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What trained, its masks, and the optimizer with its averages, step and pattern."""
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    masks = {name: module.lora_keep for name, module in named_adapters(model)}
    return {"trained": trained, "masks": masks, "optimizer": optimizer.state_dict()}


def write_state(file: Path, state: dict[str, Any]) -> None:
    """All of it, or what was in `file` before."""
    write_files(file.parent, {file.name: lambda path: torch.save(state, path)})


def cut(file: Path, count: int) -> Path:
    """The file with its first `count` lines: those behind the checkpoint will be written again."""
    held = file.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if file.exists() else []
    write_files(file.parent, {file.name: lambda path: path.write_text("".join(held), encoding="utf-8")})
    return file
