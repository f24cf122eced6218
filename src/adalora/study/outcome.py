"""The folder of a run that ended → its record; what the study does not need is removed from it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from safetensors import safe_open

from ..jsonfiles import believed, read_object
from ..runfiles import RANKS_FILE, RESULT
from .grid import Run
from .results import Record

_KEPT = {RESULT, RANKS_FILE, "recipe.yaml", "metrics.jsonl", "adapter"}
_KEPT_BYTES = 4_000_000  # an adapter above that is dropped: full fine-tuning stores the whole model


def finished_record(run: Run, digest: str, folder: Path, wall: float) -> Record:
    """What a run that ended well says of itself. Raises ValueError if it did not, with the reason, and AdapterFileError
    for files that are damaged.
    """
    file = folder / RESULT
    if not file.is_file():
        raise ValueError("it ended without a result.json")
    result = read_object(file)
    if not result.get("complete"):
        raise ValueError(f"it was stopped before its end: {result.get('stopped')}")
    with believed(folder):
        return begun_record(run, digest, "finished") | _outcome(result, folder, wall)


def _outcome(result: Record, folder: Path, wall: float) -> Record:
    metric = result["metric"]
    return {
        "metric": metric,
        "validation": _defined(result["validation"][metric]),
        "test": _defined(result["scores"][metric]),
        "scored_on": result["split"],
        "parameters": result["parameters"],
        "steps": result["steps"],
        "seconds": result["train_seconds"],
        "wall_seconds": round(wall, 1),
        "device": result["environment"]["device"],
        "ranks": final_ranks(folder),
    }


def failed_record(run: Run, digest: str, error: str, wall: float) -> Record:
    """A run that did not end well, with the line that says why."""
    return begun_record(run, digest, "failed") | {"error": error, "wall_seconds": round(wall, 1)}


def begun_record(run: Run, digest: str, status: str) -> Record:
    """What is known before."""
    cell = run.cell
    place = {"task": cell.task, "arm": cell.arm, "budget": cell.budget, "learning_rate": run.rate, "seed": run.seed}
    return {"id": run.id, "digest": digest, **place, "status": status}


def last_line(log: Path) -> str:
    """The line of a log that says what went wrong: the last that is not blank."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "it said nothing"


def final_ranks(folder: Path) -> dict[str, int] | None:
    """Rank by module of a run whose ranks differ; None where all are one.

    From the last allocation, from PEFT's AdaLoRA masks, or from the shapes of the stored A.
    """
    ranks, config = folder / RANKS_FILE, folder / "adapter" / "adapter_config.json"
    lines = ranks.read_text(encoding="utf-8").splitlines() if ranks.is_file() else []
    if lines:
        return {name: int(rank) for name, rank in json.loads(lines[-1])["ranks"].items()}
    found = _ranks_of_peft(config)
    return found if len(set(found.values())) > 1 else None


def _ranks_of_peft(config: Path) -> dict[str, int]:
    pattern = (json.loads(config.read_text(encoding="utf-8")).get("rank_pattern") if config.is_file() else None) or {}
    if any(isinstance(mask, list) for mask in pattern.values()):
        return {_short(name): sum(map(bool, mask)) for name, mask in pattern.items()}
    file = config.with_name("adapter_model.safetensors")
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as tensors:
        return {_short(key): tensors.get_slice(key).get_shape()[0] for key in tensors.keys() if ".lora_A" in key}  # noqa: SIM118


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def tidy(folder: Path) -> None:
    """Leave the records and a small adapter: a study has hundreds of these folders."""
    for path in folder.iterdir():
        if path.name not in _KEPT:
            _remove(path)
    adapter = folder / "adapter"
    if not adapter.is_dir():
        return
    for path in adapter.iterdir():
        weights = path.suffix in (".safetensors", ".bin")
        if path.name != "adapter_config.json" and not (weights and path.stat().st_size <= _KEPT_BYTES):
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _defined(score: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return score if math.isfinite(score) else None
