"""Twenty thousand allocations on a small model: memory stays flat, every allocation is on its budget, files agree.

    python -m benchmarks.soak --steps 20000

Every optimizer step allocates. After each, the kept triplets are exactly what the schedule grants, masks and Λ agree,
and now and then the adapter is stored and its pattern compared. Memory is that of the process, and the Python objects.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adalora
from adalora.checkpoint import CONFIG_FILE
from benchmarks import records

LOOKS = 40  # at memory and files, over the run
MOST_KB, MOST_OBJECTS = 8 * 1024, 100  # a step that kept 1 kB, or an object in a hundred steps, would be over it


def main(arguments: Sequence[str] | None = None) -> None:
    """Soak, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "soak.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = soak(options.steps)
    print(json.dumps(record))
    records.store(options.out, f"{options.steps} steps", record | {"environment": records.environment()})
    if record["off_budget"] or record["drifted"]:
        sys.exit("the budget was missed, or masks and files differ")
    if leaks(record):
        sys.exit("memory grew")


def leaks(record: records.Record) -> bool:
    """Whether the second half of a run grew by more than an allocator of the C library does by itself."""
    grown = record["kB_grown_in_the_second_half"], record["objects_grown_in_the_second_half"]
    return grown[0] > MOST_KB or grown[1] > MOST_OBJECTS


def soak(steps: int, looks_wanted: int = LOOKS) -> records.Record:
    """Train for `steps` steps, each of which allocates, and look."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    config = adalora.AdaLoraConfig(
        target_modules=["0", "2", "4"],
        init_r=8,
        target_r=4,
        tinit=0,
        tfinal=0,
        deltaT=1,
        lora_alpha=8,
        beta1=0.1,
        beta2=0.1,
    )
    adalora.inject(model, config)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=2e-2)
    allocator = adalora.RankAllocator(model, steps).attach(optimizer)
    seen: dict[str, int] = {"allocations": 0, "off_budget": 0, "drifted": 0}

    def listen(step: int, budget: int, keep: Mapping[str, Tensor]) -> None:
        kept = sum(int(mask.sum()) for mask in keep.values())
        seen["allocations"] += 1
        seen["off_budget"] += not kept == allocator.live == budget == allocator.schedule.budget(step)

    allocator.on_allocate.append(listen)
    looks: list[dict[str, int]] = []
    begun, changes, last = time.monotonic(), 0, b""
    with tempfile.TemporaryDirectory() as folder:
        for step in range(steps):
            x = torch.randn(8, 12)
            # There is nothing to learn, and importance forgets at once, so that the pattern moves all the time.
            nn.functional.mse_loss(model(x), 3 * torch.randn(8, 4)).backward()
            optimizer.step()
            optimizer.zero_grad()
            masks = [module.lora_keep for module in allocator.modules.values()]
            seen["drifted"] += any(
                bool((module.lora_E.detach().view(-1)[~module.lora_keep] != 0).any())
                for module in allocator.modules.values()
            )
            pattern = torch.cat(masks).numpy().tobytes()
            changes, last = changes + (pattern != last), pattern
            if step % max(steps // looks_wanted, 1) == 0 or step == steps - 1:
                seen["drifted"] += _stored_pattern(model, Path(folder)) != _live_pattern(allocator)
                looks.append(_memory())
    half = looks[len(looks) // 2 :]
    return {
        "steps": steps,
        **seen,
        "pattern_changes": changes,
        "live_at_the_end": allocator.live,
        "MB": [look["kB"] // 1024 for look in (looks[0], half[0], looks[-1])],
        "kB_grown_in_the_second_half": half[-1]["kB"] - half[0]["kB"],
        "objects_grown_in_the_second_half": half[-1]["objects"] - half[0]["objects"],
        "s": round(time.monotonic() - begun, 1),
    }


def _stored_pattern(model: nn.Module, folder: Path) -> dict[str, list[bool]]:
    adalora.save_adapter(model, folder / "adapter", warn=False)
    stored: dict[str, Any] = json.loads((folder / "adapter" / CONFIG_FILE).read_text(encoding="utf-8"))
    return stored["rank_pattern"] or {}


def _live_pattern(allocator: adalora.RankAllocator) -> dict[str, list[bool]]:
    pattern = {f"{name}.lora_E": module.lora_keep.tolist() for name, module in allocator.modules.items()}
    return {} if all(all(keep) for keep in pattern.values()) else pattern


def _memory() -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return {"kB": pages * os.sysconf("SC_PAGE_SIZE") // 1024, "objects": len(gc.get_objects())}


if __name__ == "__main__":
    main()
