"""The most memory that each process of a run takes: `python -m benchmarks.devices`, results in results/devices.json.

One process, DDP and FSDP2 (`fully_shard`, each layer for itself) train the same adapters on the same frozen base, by
gloo on a CPU. Counted is what the kernel says a process had at most in the training steps, beyond what it had before
there was a model: base, adapters, gradients, Adam, averages, activations of one row. Blocks of 1 MB and more go back to
the kernel when they are freed (MALLOC_MMAP_THRESHOLD_), or what FSDP gathers and frees would be counted for good.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import tempfile
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import adalora
from benchmarks import records

RESULT = records.RESULTS / "devices.json"
WIDTH, LAYERS, STEPS = 2048, 12, 6
CONFIG = adalora.AdaLoraConfig(init_r=64, target_r=32, tinit=1, tfinal=2, deltaT=1)
KINDS = ("DDP", "FSDP2")


def main() -> None:
    """Measure each kind with each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for kind, processes in [("one process", 1), *((kind, count) for kind in KINDS for count in options.processes)]:
        record = measure(kind, processes)
        print(f"{kind}, {processes}: {record}", flush=True)
        records.store(options.out, f"{kind}, {processes}", record | {"environment": records.environment()})


def measure(kind: str, processes: int, width: int = WIDTH, layers: int = LAYERS) -> records.Record:
    """MB of each process at most, and of what all of it would be in one place."""
    sides, weights = 2 * width * layers, 4 * layers * width**2
    adapters = 4 * CONFIG.init_r * (sides + layers)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # read by the C library of each process at its start
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(train, (processes, kind, width, layers, folder), nprocs=processes)
        found = [int((Path(folder) / f"{rank}").read_text(encoding="utf-8")) for rank in range(processes)]
    return {"base MB": weights >> 20, "adapters' six copies, MB": 6 * adapters >> 20, "peak MB of each": found}


def train(rank: int, processes: int, kind: str, width: int, layers: int, folder: str) -> None:
    """One process of a run, which writes its peak."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    run(kind, processes, 8, 2)  # imports, which take more than the model does
    gc.collect()
    before = memory("VmRSS")
    run(kind, processes, width, layers)
    Path(folder, str(rank)).write_text(str((memory("VmHWM") - before) >> 20), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # threads of gloo may outlive their group


def run(kind: str, processes: int, width: int, layers: int) -> None:
    """Build, and train with the peak counted from the first step on."""
    torch.manual_seed(0)
    root = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    adalora.inject(root, CONFIG)
    model: nn.Module = root
    if kind == "FSDP2":
        mesh = init_device_mesh("cpu", (processes,))
        for module in [*root, root]:
            fully_shard(module, mesh=mesh)
    elif kind == "DDP":
        model = DistributedDataParallel(root)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(root), lr=1e-3)
    adalora.RankAllocator(root, STEPS).attach(optimizer)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building left over
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    for _ in range(STEPS):
        model(torch.randn(1, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def memory(name: str) -> int:
    """Bytes of this process by the kernel's own count. Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


if __name__ == "__main__":
    main()
