"""Victims that train in a plain loop, which saves and goes on by itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it at their first step: once here, not in every forked run
from torch import nn

import adalora
from benchmarks.board import FINAL, MICRO, SCHEDULE, STEPS, Board, cut, end, write_state

CHECKPOINT_EVERY = 7  # micro-batches: every second checkpoint lies between two of one step


def plain(out: Path, board: Board) -> None:
    """Gradients are checkpointed too, so that a run goes on between two micro-batches of a step."""
    _loop(out, board, compact=False)


def compacting(out: Path, board: Board) -> None:
    """The same, with pruned triplets freed when the pattern is final."""
    _loop(out, board, compact=True)


def _loop(out: Path, board: Board, compact: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(8, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    adalora.inject(model, adalora.AdaLoraConfig(target_modules=["0", "3"], modules_to_save=["5"], **SCHEDULE))
    file = out / "state.pt"
    held: dict[str, Any] = torch.load(file, weights_only=True) if file.exists() else {}
    if held:
        model.load_state_dict(held["model"])
    parameters = adalora.adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    if held:
        optimizer.load_state_dict(held["optimizer"])
        rate.load_state_dict(held["rate"])
        for parameter, gradient in zip(parameters, held["gradients"], strict=True):
            parameter.grad = gradient
        torch.set_rng_state(held["generator"])
    allocator = adalora.RankAllocator(model, STEPS, compact=compact).attach(optimizer)
    begin = held.get("place", 0)
    lines = cut(out / "metrics.jsonl", begin)
    with lines.open("a", encoding="utf-8") as metrics:
        for place in range(begin, STEPS * MICRO):
            board.tell(place)
            loss = nn.functional.cross_entropy(model(_inputs(place)), _inputs(place)[:, :3].argmax(1))
            (loss / MICRO).backward()
            if place % MICRO == MICRO - 1:
                optimizer.step()
                optimizer.zero_grad()
                rate.step()
            ranks = {name: module.rank for name, module in allocator.modules.items()}
            record = {"place": place, "loss": loss.item(), "ranks": ranks, "importance": _digest(optimizer)}
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            if place % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rate": rate.state_dict(),
                    # Compaction has put new parameters in the place of the old ones.
                    "gradients": [parameter.grad for parameter in adalora.adapter_parameters(model)],
                    "generator": torch.get_rng_state(),
                    "place": place + 1,
                }
                board.tell(place, writing=True)
                write_state(file, state)
    board.tell(STEPS * MICRO, writing=True)
    adalora.save_adapter(model, out / "adapter")
    state = end(model, optimizer) | {"metrics": lines.read_text(encoding="utf-8")}
    write_state(out / FINAL, state)


def _inputs(place: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(place))


def _digest(optimizer: torch.optim.Optimizer) -> str:
    """Of everything that the optimizer holds for each parameter, the averages of importance among it."""
    total = hashlib.sha256()
    for state in optimizer.state_dict()["state"].values():
        for key in sorted(state):
            total.update(key.encode() + torch.as_tensor(state[key]).numpy().tobytes())
    return total.hexdigest()[:16]
