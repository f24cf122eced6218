"""A victim that trains with Accelerate and goes on from what its `save_state` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import adalora
from adalora.files import staged
from benchmarks.board import FINAL, MICRO, SCHEDULE, STEPS, Board, cut, end, write_state

SAVE_EVERY = 3  # optimizer steps; Accelerate keeps no gradients, so never between two micro-batches


def accelerated(out: Path, board: Board) -> None:
    """Each checkpoint is a folder that appears when it is whole, so that the newest is the one to go on from."""
    import accelerate

    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 3))
    adalora.inject(model, adalora.AdaLoraConfig(target_modules=["0", "3"], **SCHEDULE))
    last = max(out.glob("after-*"), key=_steps, default=None)
    if last:  # compaction has changed the sizes, so in front of the optimizer
        model.load_state_dict(load_file(last / "model.safetensors"))
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=2e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    model, optimizer, rate = accelerator.prepare(model, optimizer, rate)
    if last:
        accelerator.load_state(str(last))
    adalora.RankAllocator(model, STEPS, compact=True).attach(optimizer)
    begin = _steps(last) if last else 0
    lines = cut(out / "metrics.jsonl", begin * MICRO)
    with lines.open("a", encoding="utf-8") as metrics:
        for place in range(begin * MICRO, STEPS * MICRO):
            board.tell(place)
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(place))
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
                accelerator.backward(loss)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            metrics.write(json.dumps({"place": place, "loss": loss.item()}) + "\n")
            metrics.flush()
            done, between = divmod(place + 1, MICRO)
            if done % SAVE_EVERY == 0 and not between:
                board.tell(place, writing=True)
                with staged(out / f"after-{done}") as folder:
                    accelerator.save_state(str(folder))
    board.tell(STEPS * MICRO, writing=True)
    write_state(out / FINAL, end(model, optimizer) | {"metrics": lines.read_text(encoding="utf-8")})


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
