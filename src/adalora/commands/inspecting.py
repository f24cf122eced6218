"""`adalora inspect`: what an adapter folder holds, read from its files alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterFileError
from .console import AsJson, Source, open_console, print_json

if TYPE_CHECKING:
    from ..report import RankReport

INSPECT_EPILOG = "Example: adalora inspect runs/mine --json"
_LORA_A = re.compile(r"(?P<name>.+)\.lora_(?:A\.weight|embedding_A)")


def inspect(folder: Source, as_json: AsJson = False) -> None:
    """Show ranks, heat map, what was pruned, and totals of an adapter of ours or of PEFT (AdaLoRA, LoRA)."""
    facts, report = inspect_facts(folder)
    if as_json:
        print_json(facts)
        return
    from rich.text import Text

    console = open_console()
    for key in ("folder", "method", "base_model", "task_type"):
        console.print(f"{key:<11} {facts[key]}", markup=False)
    config = ", ".join(f"{key} {value}" for key, value in facts["config"].items())
    console.print(f"{'config':<11} {config}\n", markup=False)
    console.print(report.table(), markup=False)
    console.print()
    console.print(Text.from_ansi(report.heatmap(color=console.is_terminal)))
    console.print(f"\n{_pruned(facts)}", markup=False)
    whole = f"; {facts['whole_parameters']:,} in {', '.join(facts['whole'])}" if facts["whole"] else ""
    console.print(f"{facts['parameters']:,} adapter parameters{whole}; {facts['file_bytes']:,} bytes", markup=False)


def inspect_facts(folder: Path) -> tuple[dict[str, Any], RankReport]:
    """Everything about an adapter that its files tell, JSON-able. Raises AdapterFileError."""
    from ..jsonfiles import believed
    from .runs import adapter_folder

    adapter = adapter_folder(folder)
    with believed(adapter):
        return _facts(adapter)


def _facts(adapter: Path) -> tuple[dict[str, Any], RankReport]:
    from ..jsonfiles import read_object
    from ..reading import CONFIG_FILE, WEIGHTS_FILE

    config = read_object(adapter / CONFIG_FILE)
    kind = config.get("peft_type")
    readers = {"ADALORA": _adalora, "LORA": _lora}
    if kind not in readers:
        raise AdapterFileError(f"{str(adapter)!r} is a {kind!r} adapter; readable are {', '.join(readers)}.")
    report, shown, whole = readers[kind](adapter, config)
    total = sum(row.capacity for row in report.rows)
    facts = {
        "folder": str(adapter),
        "method": {"ADALORA": "AdaLoRA", "LORA": "LoRA"}[kind],
        "base_model": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "config": shown,
        "ranks": report.ranks,
        "matrices": len(report.rows),
        "triplets": report.total_rank,
        "capacity": total,
        "pruned": total - report.total_rank,
        "empty": [row.name for row in report.rows if row.rank == 0],
        "untouched": [row.name for row in report.rows if row.rank == row.capacity],
        "parameters": report.parameters,
        "whole": sorted({name.rpartition(".")[0] for name in whole}),
        "whole_parameters": sum(whole.values()),
        "file_bytes": (adapter / WEIGHTS_FILE).stat().st_size,
    }
    return facts, report


def _adalora(adapter: Path, config: dict[str, Any]) -> tuple[RankReport, dict[str, Any], dict[str, int]]:
    """(ranks, what to show of the configuration, tensors stored whole with their sizes)."""
    from ..reading import read_adapter
    from ..report import ModuleRank, RankReport, split_name
    from ..targets import bound

    stored = read_adapter(adapter)
    rows, whole = [], 0
    for name, (A, _, B) in stored.factors.items():
        layer, kind = split_name(name)
        rank, cost = A.shape[0], A.shape[1] + B.shape[0] + 1
        capacity = max(bound(stored.config.max_rank, name, stored.config.init_r), rank)
        rows.append(ModuleRank(name, layer, kind, rank, capacity, rank * cost))
        whole += capacity * cost
    keys = ("init_r", "target_r", "lora_alpha", "tinit", "tfinal", "deltaT", "total_step", "orth_reg_weight")
    shown = {key: getattr(stored.config, key) for key in keys}
    return RankReport(tuple(rows), whole), shown, {name: value.numel() for name, value in stored.whole.items()}


def _lora(adapter: Path, config: dict[str, Any]) -> tuple[RankReport, dict[str, Any], dict[str, int]]:
    from safetensors import SafetensorError, safe_open

    from ..reading import PREFIX, WEIGHTS_FILE
    from ..report import ModuleRank, RankReport, split_name

    shapes: dict[str, list[int]] = {}
    try:
        with safe_open(adapter / WEIGHTS_FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                shapes[key.removeprefix(PREFIX)] = list(file.get_slice(key).get_shape())
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"cannot read {str(adapter / WEIGHTS_FILE)!r}: {error}. It is missing or damaged."
        ) from error
    rows, own = [], set()
    for key, shape in shapes.items():
        if found := _LORA_A.fullmatch(key):
            name = found["name"]
            parts = {key, key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")}
            layer, kind = split_name(name)
            if not parts <= shapes.keys():
                raise AdapterFileError(
                    f"{str(adapter / WEIGHTS_FILE)!r} has {key!r} without {min(parts - shapes.keys())!r}; restore it "
                    "from a copy."
                )
            rows.append(ModuleRank(name, layer, kind, shape[0], shape[0], sum(_size(shapes[part]) for part in parts)))
            own |= parts
    if not rows:
        raise AdapterFileError(
            f"{str(adapter / WEIGHTS_FILE)!r} holds no lora_A; it is no LoRA. Restore it from a copy."
        )
    keys = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora")
    shown = {key: config[key] for key in keys if key in config}
    whole = {key: _size(shape) for key, shape in shapes.items() if key not in own}
    return RankReport(tuple(rows), sum(row.parameters for row in rows)), shown, whole


def _pruned(facts: dict[str, Any]) -> str:
    if facts["method"] == "LoRA":
        return f"{facts['triplets']} ranks in {facts['matrices']} matrices; nothing is pruned in LoRA"
    share = facts["pruned"] / max(facts["capacity"], 1)
    empty = f"{len(facts['empty'])} matrices are empty" if facts["empty"] else "no matrix is empty"
    return (
        f"{facts['pruned']} of {facts['capacity']} triplets pruned ({share:.0%}), {facts['triplets']} left; {empty}, "
        f"{len(facts['untouched'])} keep all"
    )


def _size(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
