"""Which graph of one adapted layer is the cheaper, by shape and tokens: `python -m benchmarks.graphs`.

Forward and backward of a single layer, fp32, rank 12, ratio to the frozen layer (which passes the gradient of its
input on). This is where `functional.MERGE_FROM` comes from: tokens are given as multiples of mn/(m+n).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from adalora import functional
from benchmarks import records

SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072))
RANK = 12


def measure(out: int, in_: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median of the paired ratios to the frozen layer of both graphs and of PEFT's three calls."""
    weight, bias = torch.randn(out, in_) / in_**0.5, torch.randn(out)
    three = tuple(torch.randn(shape).requires_grad_() for shape in ((RANK, in_), (RANK, 1), (out, RANK)))
    x, grad = torch.randn(tokens, in_, requires_grad=True), torch.randn(tokens, out)
    A, E, B = three

    def graph(merge: bool) -> torch.Tensor:
        return functional._apply(x, None, weight, bias, A, E, B, 1.3, merge)

    arms: dict[str, Callable[[], torch.Tensor]] = {
        "frozen": lambda: F.linear(x, weight, bias),
        "LoRA": lambda: F.linear(x, weight, bias) + F.linear(F.linear(x, A), B) * 1.3,
        "split": lambda: graph(False),
        "merged": lambda: graph(True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 2):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            arms[name]().backward(grad)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
            for tensor in (x, *three):
                tensor.grad = None
    pairs = {name: zip(times, seconds["frozen"], strict=True) for name, times in seconds.items()}
    return {name: statistics.median(own / floor for own, floor in both) for name, both in pairs.items()}


def main() -> None:
    """Measure and print one line for each shape and number of tokens; write results/graphs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multiples", type=float, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        for out, in_ in SHAPES:
            for multiple in options.multiples:
                tokens = round(multiple * out * in_ / (out + in_))
                row = measure(out, in_, tokens, options.rounds)
                ratios = "  ".join(f"{name} {ratio:.3f}" for name, ratio in row.items() if name != "frozen")
                print(
                    f"{threads} thread(s)  {out} × {in_}  {multiple:g} · mn/(m+n) = {tokens} tokens  {ratios}",
                    flush=True,
                )
                key = f"{out}x{in_}/{tokens} tokens/{threads} threads"
                record = {"shape": [out, in_], "tokens": tokens, "multiple": multiple, "threads": threads}
                records.store(
                    records.RESULTS / "graphs.json",
                    key,
                    record | {"ratios": row, "environment": records.environment("cpu")},
                )


if __name__ == "__main__":
    main()
