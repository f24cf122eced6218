"""Allocation at the size of large models: `python -m benchmarks.scale`, results in results/scale.json.

The base model is on the meta device and costs nothing; the adapters of its matrices are real, with random gradients.
Counted from the shapes, for any size: what a run holds and sends. Measured: what the method adds to an optimizer step,
what an allocation takes, and what Python takes for as many matrices when they are sharded.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import distributed, nn

import adalora
from adalora.injection import named_adapters
from benchmarks import records

RESULT = records.RESULTS / "scale.json"
BYTES = 4  # adapters and everything kept for them are fp32
INIT_R, TARGET_R = 16, 8


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: seven adapted matrices (out, in) a layer."""

    width: int
    keys: int
    inner: int
    layers: int
    billions: float

    def matrices(self) -> list[tuple[int, int]]:
        """Of the whole model."""
        d, k, f = self.width, self.keys, self.inner
        return [(d, d), (k, d), (k, d), (d, d), (f, d), (f, d), (d, f)] * self.layers


SHAPES = {
    "7B": Shape(4096, 4096, 11008, 32, 6.7),
    "70B": Shape(8192, 1024, 28672, 80, 70.6),
    "400B": Shape(16384, 1024, 53248, 126, 405.9),
}


class Matrices(nn.Module):
    """Adapted matrices of the given shapes, whose weights take no memory."""

    def __init__(self, shapes: list[tuple[int, int]], device: str = "meta") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(in_, out, bias=False, device=device) for out, in_ in shapes)


def plan(shape: Shape, processes: int) -> records.Record:
    """Bytes of one process and of one step, by arithmetic."""
    matrices, r = shape.matrices(), INIT_R
    triplets = r * len(matrices)
    sides_A, parameters = sum(in_ for _, in_ in matrices), r * sum(out + in_ + 1 for out, in_ in matrices)
    # fully_shard cuts the first dimension: the rows of A and E, of which there are r, and those of B.
    rows = -(-r // processes)
    largest = sum(rows * (in_ + 1) + -(-out // processes) * r for out, in_ in matrices)
    by_columns = sum(r * -(-in_ // processes) + rows + -(-out // processes) * r for out, in_ in matrices)
    part = (processes - 1) / processes
    return {
        "matrices": len(matrices),
        "triplets": triplets,
        "parameters": parameters,
        "base bytes (bf16)": int(2e9 * shape.billions / processes),
        "adapter bytes (weights, gradients, Adam, averages), unsharded": 6 * BYTES * parameters,
        "the same, largest part of fully_shard": 6 * BYTES * largest,
        "the same, with A cut by columns": 6 * BYTES * by_columns,
        "all-reduced in an allocation": 2 * BYTES * triplets,
        "all-reduced in a step, sharded": BYTES * (2 * len(matrices) * r * r + 1),
        "sent in a step by who holds rows of A, sharded": int(2 * BYTES * rows * sides_A * part),
        "adapter gradients all-reduced in a step, DDP": BYTES * parameters,
    }


def adapted(shapes: list[tuple[int, int]], device: str = "meta") -> nn.Module:
    """An injected model whose adapters hold numbers, with gradients."""
    config = adalora.AdaLoraConfig(init_r=INIT_R, target_r=TARGET_R, target_modules="all-linear")
    model = adalora.inject(Matrices(shapes, device), config)
    for _, module in named_adapters(model):
        module.lora_keep = torch.ones(INIT_R, dtype=torch.bool)
        for key in ("lora_A", "lora_E", "lora_B"):
            parameter = nn.Parameter(torch.randn(getattr(module, key).shape).mul_(0.02))
            module._parameters[key] = parameter
    return model


def measure(name: str, rounds: int) -> records.Record:
    """Seconds of the parts of a step over the adapters of SHAPES[name], and the memory that this takes."""
    model = adapted(SHAPES[name].matrices())
    parameters = adalora.adapter_parameters(model)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    before = rss()
    allocator, optimizer = stepping(model, parameters)
    seconds = timed(allocator, optimizer, rounds)
    size = BYTES * sum(parameter.numel() for parameter in parameters)
    return seconds | {
        "bytes of the weights": size,
        "bytes of averages": 2 * size,
        "bytes at most beyond weights and gradients": peak() - before,
        "live": allocator.live,
        "budget": allocator.schedule.budget(500),
    }


def measure_sharded(name: str, rounds: int) -> records.Record:
    """Seconds of the same with as many matrices, of 16 × 16, under `fully_shard` in a group of one: Python's share."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    shapes = [(16, 16)] * len(SHAPES[name].matrices())
    found = {}
    for kind in ("plain", "sharded"):
        model = adapted(shapes, "cpu")
        if kind == "sharded":
            fully_shard(model, mesh=DeviceMesh("cpu", [0]))
        parameters = adalora.adapter_parameters(model)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter.detach(), 1e-3)
        found |= {f"{kind}: {part}": value for part, value in timed(*stepping(model, parameters), rounds).items()}
    return found


def stepping(model: nn.Module, parameters: list[nn.Parameter]) -> tuple[adalora.RankAllocator, torch.optim.Optimizer]:
    """An allocator in the reduction phase. SGD: its own update is not the question, and it holds nothing."""
    optimizer = torch.optim.SGD(parameters, lr=1e-3, foreach=False)
    allocator = adalora.RankAllocator(model, total_step=1000).attach(optimizer)
    allocator._attached_to.run.step = 500
    return allocator, optimizer


def timed(allocator: adalora.RankAllocator, optimizer: torch.optim.Optimizer, rounds: int) -> records.Record:
    """Median seconds of CPU time, on one thread, of each part of what an allocator does: other jobs do not count."""
    held = allocator._attached_to
    parts: dict[str, Callable[[], Any]] = {
        "regularizer, each step": held._add_penalty,
        "averages, each step": held.averages.update,
        "allocation": lambda: allocator._allocate(500, allocator.schedule.budget(500)),
    }
    found: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(rounds + 1):
        for part, action in parts.items():
            begun = time.process_time()
            action()
            found[part].append(time.process_time() - begun)
    return {f"CPU seconds: {part}": round(median(times[1:]), 4) for part, times in found.items()}


def rss() -> int:
    """Bytes of this process now. Linux only."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most bytes that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Plans for every size, measurements for one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=SHAPES, default="70B")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        for processes in (1, 8, 64):
            records.store(RESULT, f"plan {name}, {processes} processes", plan(shape, processes))
    where = {"environment": records.environment(), "rounds": options.rounds}
    records.store(RESULT, f"measured {options.measure}", measure(options.measure, options.rounds) | where)
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        found = measure_sharded(options.measure, options.rounds)
        distributed.destroy_process_group()
    records.store(RESULT, f"Python's share {options.measure}", found | where)


if __name__ == "__main__":
    main()
