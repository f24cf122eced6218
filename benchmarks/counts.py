"""Exact counts of one training step in each arm: `python -m benchmarks.counts`.

ATen calls, host syncs, bytes of state, bytes saved for backward, peak bytes of a step. They are the same on
every run with the same versions. The optimizer's own update is counted apart and is in no total: it is the same
for both sides but for the number of parameters, and its implementation is the user's choice.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.arms import STAGES, Arm, Builder, Setting, trained
from benchmarks.models import SHAPES, Batch
from benchmarks.table import counts_table
from benchmarks.tracer import living, own_update_apart, peak_bytes, saved_bytes, storages, tracing

PHASES = ("forward", "backward", "bookkeeping")
WARMUP = 3  # steps that create optimizer state and leave the next one an allocation step


def examine(build: Builder, setting: Setting, batch: Batch) -> records.Record:
    """All counts of one arm."""
    others = living(setting.device)  # held until the end, so that none of their addresses is used again
    known = storages(others)
    arm = build(setting)
    single = setting.shape.batch(setting.shape.length(64), setting.device)  # state does not depend on the batch
    for _ in range(WARMUP):
        arm.step(single)
    calls = count_calls(arm, batch)
    del single
    resident = {place: size for place, size in storages(living(setting.device)).items() if place not in known}
    base = [*arm.model.parameters(), *arm.model.buffers()]
    saved = saved_bytes(lambda: arm.loss(batch), [*base, *batch.values()])
    temporary = peak_bytes(lambda: arm.step(batch), setting.device)
    return {
        **calls,
        **state_bytes(arm, resident),
        "saved": saved,
        "temporary": temporary,
        "resident": sum(resident.values()),
        "peak": sum(resident.values()) + temporary,
    }


def count_calls(arm: Arm, batch: Batch) -> records.Record:
    """Calls by phase, host syncs and lists copied to the device, in one step of `arm`."""
    with tracing() as tracer, own_update_apart(arm.optimizer, tracer):
        tracer.enter("forward")
        loss = arm.loss(batch)
        tracer.enter("backward")
        loss.backward()
        tracer.enter("bookkeeping")
        arm.optimizer.step()
        arm.after_step()
        arm.optimizer.zero_grad()
        tracer.enter(None)
    model = ("forward", "backward")
    return {
        "calls": {phase: tracer.calls[phase] for phase in (*PHASES, "update")},
        "total": sum(tracer.calls[phase] for phase in PHASES),
        "syncs": tracer.syncs["bookkeeping"],
        "lists": tracer.lists["bookkeeping"],
        "syncs of the model": sum(tracer.syncs[phase] for phase in model),
    }


def state_bytes(arm: Arm, resident: dict[int, int]) -> records.Record:
    """Bytes of the optimizer's own state, and of whatever else lives beside it, the model and its buffers.

    What lives is asked of the garbage collector, not of the library: no cache escapes.
    """
    entries = [
        value
        for state in arm.optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("adalora")
    ]
    own = storages(entries)
    model = storages([*arm.model.parameters(), *arm.model.buffers()])
    besides = {place: size for place, size in resident.items() if place not in own and place not in model}
    return {
        "trained": sum(parameter.numel() for parameter in trained(arm.model)),
        "optimizer state": sum(own.values()),
        "importance state": sum(besides.values()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Count in every arm of every cell, print, write."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="(peft|transformers).*")
    for name, tokens, dropout, stage in product(options.shape, options.tokens, options.dropout, options.stage):
        setting = Setting(SHAPES[name], dropout, options.device)
        batch = setting.shape.batch(tokens, options.device)
        rows = {}
        for arm, build in STAGES[stage].items():
            rows[arm] = examine(build, setting, batch)
            gc.collect()
        place = {"device": options.device, "length": setting.shape.length(tokens)}
        record = {"shape": name, "stage": stage, "tokens": tokens, "dropout": dropout, **place, "arms": rows}
        key = f"{name}/{stage}/{tokens} tokens/dropout {dropout:g}/{options.device}"
        print(f"\n{key}\n{counts_table([record])}", flush=True)
        if options.out:
            records.store(options.out, key, record | {"environment": records.environment(options.device)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["deberta-base"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="of the adapters")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "counts.json")
    return parser


if __name__ == "__main__":
    main()
