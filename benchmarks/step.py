"""What a training step costs, against PEFT's LoRA and AdaLoRA: `python -m benchmarks.step`.

A step is forward, backward, optimizer and allocation. The arms of a cell run in one process, one step each a
round, in an order that changes; what is reported are medians over rounds, with quartiles, of the ratio to
another arm in the same round. So drift of the machine cancels, and what is left of its noise is shown.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.arms import FLOOR, LORA, STAGES, Arm, Setting, empty, trained
from benchmarks.models import SHAPES, Batch
from benchmarks.table import step_table

WARMUP = 3  # rounds left out: optimizer state, first allocations, caches

Seconds = dict[str, list[float]]


def measure(setting: Setting, tokens: int, stage: str, rounds: int, threads: int) -> records.Record:
    """One cell: times and ratios of every arm of `stage`, for batches of `tokens` tokens."""
    torch.set_num_threads(threads)
    arms = {name: build(setting) for name, build in STAGES[stage].items()}
    ratios = summarize(interleave(arms, setting.shape.batch(tokens, setting.device), rounds))
    for name, arm in arms.items():
        ratios[name] |= {"trained": sum(p.numel() for p in trained(arm.model)), "empty": empty(arm.model)}
    return {
        "shape": setting.shape.name,
        "stage": stage,
        "tokens": tokens,
        "length": setting.shape.length(tokens),
        "threads": threads,
        "dropout": setting.dropout,
        "device": setting.device,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "update": setting.update,
        "rounds": rounds,
        "arms": ratios,
        "environment": records.environment(setting.device),
    }


def interleave(arms: Mapping[str, Arm], batch: Batch, rounds: int) -> Seconds:
    """Seconds of each arm's step in each round."""
    seconds: Seconds = {name: [] for name in arms}
    for turn in range(rounds + WARMUP):
        gc.collect()  # of the garbage of one arm, none is charged to another
        for name in order(list(arms), turn):
            elapsed = timed(arms[name], batch)
            if turn >= WARMUP:
                seconds[name].append(elapsed)
    return seconds


def order(names: Sequence[str], turn: int) -> list[str]:
    """Each arm comes first in its turn; every second round runs backwards, so that predecessors change too."""
    first = turn % len(names)
    rotated = [*names[first:], *names[:first]]
    return rotated[::-1] if turn % 2 else rotated


def timed(arm: Arm, batch: Batch) -> float:
    """Seconds of one step, its work on a GPU included."""
    on_gpu = batch["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    arm.step(batch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def summarize(seconds: Seconds) -> dict[str, records.Record]:
    """Of each arm: median milliseconds, and [low quartile, median, high quartile] of the paired ratios."""
    return {
        name: {
            "ms": round(statistics.median(times) * 1000, 3),
            "floor": _quartiles(times, seconds[FLOOR]),
            "lora": _quartiles(times, seconds[LORA]),
        }
        for name, times in seconds.items()
    }


def key_of(setting: Setting, tokens: int, stage: str, threads: int) -> str:
    """The name of a cell in the file."""
    place = f"{setting.device} {str(setting.dtype).removeprefix('torch.')} {setting.update}"
    return f"{setting.shape.name}/{stage}/{tokens} tokens/{threads} threads/dropout {setting.dropout:g}/{place}"


def is_known(cell: records.Record | None, stage: str, device: str, rounds: int) -> bool:
    """Whether a stored cell answers the question: measured in this environment, every arm, with rounds enough."""
    if cell is None or cell["arms"].keys() != STAGES[stage].keys():
        return False
    return bool(cell["environment"] == records.environment(device) and cell["rounds"] >= rounds)


def usual_rounds(tokens: int) -> int:
    """Rounds by default: short steps are noisier and cheaper to repeat."""
    return 30 if tokens <= 512 else 12 if tokens <= 2048 else 8


def run(setting: Setting, tokens: int, stage: str, threads: int, rounds: int, again: bool, out: Path | None) -> None:
    """Measure a cell unless it is known, print it, and store it if there is a file to store it in."""
    key = key_of(setting, tokens, stage, threads)
    known = records.load(out).get(key) if out and not again else None
    if known is not None and is_known(known, stage, setting.device, rounds):
        print(f"{key}: known, kept (--again measures it anew)", flush=True)
        return
    record = measure(setting, tokens, stage, rounds, threads)
    print(f"\n{key}, {rounds} rounds\n{step_table([record])}", flush=True)
    if out:
        records.store(out, key, record)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the product of all choices; each cell goes into the file as soon as it is done."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="(peft|transformers).*")
    out = None if options.quick else options.out
    for name, tokens, threads, dropout, stage in product(
        options.shape, options.tokens, options.threads, options.dropout, options.stage
    ):
        setting = Setting(SHAPES[name], dropout, options.device, getattr(torch, options.dtype), options.update)
        rounds = 2 if options.quick else options.rounds or usual_rounds(tokens)
        run(setting, tokens, stage, threads, rounds, options.again, out)


def _quartiles(times: list[float], reference: list[float]) -> list[float]:
    ratios = [own / other for own, other in zip(times, reference, strict=True)]
    return [round(value, 4) for value in statistics.quantiles(ratios, n=4, method="inclusive")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["minilm"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048], help="tokens in a batch")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0], help="of the adapters")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rounds", type=int, help="by default 30, 12 or 8, as the batch grows")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--update", choices=["default", "foreach", "fused"], default="fused", help="AdamW's, all arms")
    parser.add_argument("--again", action="store_true", help="measure cells that the file holds already")
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that it runs; stores nothing")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "step.json")
    return parser


if __name__ == "__main__":
    main()
