"""Results as JSON files of cells: each cell says under what it was measured, and cells of separate runs merge."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

Record = dict[str, Any]


def load(path: Path) -> dict[str, Record]:
    """The cells in `path` by key; none if there is no such file."""
    return json.loads(path.read_text())["cells"] if path.exists() else {}


def store(path: Path, key: str, record: Record) -> None:
    """Put one cell into `path`, beside those that are there."""
    cells = {**load(path), key: record}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps({"cells": dict(sorted(cells.items()))}, indent=1) + "\n")
    fresh.replace(path)


def environment(device: str = "cpu") -> Record:
    """Everything outside the code that a time depends on and that both sides share."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "transformers")},
        "allocator": allocator_settings(os.environ),
    }


def processor() -> str:
    """Name of the CPU. Linux tells it in a file only."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.processor() or not cpuinfo.exists():
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def allocator_settings(variables: Mapping[str, str]) -> dict[str, str]:
    """What tunes memory allocation: of the C library, of a preloaded one, of torch, of the kernel."""
    names = ("LD_PRELOAD", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "PYTORCH_CUDA_ALLOC_CONF")
    found = {name: value for name, value in variables.items() if name.startswith("MALLOC_") or name in names}
    if TRANSPARENT_HUGE_PAGES.exists():
        found["transparent huge pages"] = TRANSPARENT_HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    return found
