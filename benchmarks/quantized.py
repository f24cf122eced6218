"""AdaLoRA on quantized bases: memory, accuracy, and what each way to merge costs.

    python -m benchmarks.quantized

trains the demo's task for one epoch on the packaged encoder, on one seed, as it is and in each kind of few bits that
runs on a CPU, then merges every way and counts again. Writes benchmarks/results/quantized.json and brings the table of
docs/quantized.md up to date.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from adalora.injection import named_adapters
from adalora.merging import merge, unmerge
from adalora.quantized import CHOICES, dequantized, is_quantized
from adalora.recipe import load_recipe
from adalora.result import RunResult
from adalora.tasks.docstrings import load, write_jsonl
from adalora.tasks.foreign import silenced
from adalora.train import run
from benchmarks import records

ROOT = Path(__file__).parent.parent
RESULTS = records.RESULTS / "quantized.json"
DOCUMENT = ROOT / "docs" / "quantized.md"
KINDS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "NF4, nested": {"load_in_4bit": True},
    "int8 (bitsandbytes)": {"load_in_8bit": True},
    "int8 (torchao)": {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"},
    "int4 (torchao)": {
        "quant_method": "torchao",
        "quant_type": "IntxWeightOnlyConfig",
        "weight_dtype": "int4",
        "group_size": 32,
    },
}
# One epoch shows order of magnitude; embeddings are never quantized here.
SETTINGS = ["training.num_train_epochs=1", "training.logging_steps=1000"]


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    again = parser.parse_args().again
    torch.set_num_threads(1)
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        files = write_jsonl(Path(folder) / "data", load())
        data = [f"data.{split}={files[split != 'train']}" for split in ("train", "validation", "test")]
        for name, section in KINDS.items():
            if again or name not in records.load(RESULTS):
                records.store(RESULTS, name, measure(name, section, data, Path(folder)))
                write_document()


def measure(name: str, section: dict[str, Any] | None, data: list[str], folder: Path) -> records.Record:
    """One kind: train, then merge every way."""
    chosen = [] if section is None else [f"model.quantization_config={json.dumps(section)}"]
    recipe, console = load_recipe("docstrings", [*data, *SETTINGS, *chosen]), Console()
    console.print(name)
    result = run(recipe, folder / name.replace(" ", "-"), console)
    found: records.Record = {"accuracy": result.scores["accuracy"], "seconds": round(result.seconds, 1)}
    found["linear_bytes"] = sum(
        held_bytes(module) for module in result.model.modules() if isinstance(module, nn.Linear)
    )
    live = logits(result)
    for into in CHOICES if section else ():
        with silenced("adalora"):
            error = merge(result.model, quantized=into)  # type: ignore[arg-type]
        assert error is not None
        found[into] = error._asdict() | agreement(result, live)
        unmerge(result.model)
    if section:
        found["original"] = agreement(merged_into_original(result, data), live)
    return found | {"environment": records.environment()}


def merged_into_original(result: RunResult, data: list[str]) -> RunResult:
    """The increments on the weights from before they were quantized, as most tools merge."""
    import dataclasses

    recipe = load_recipe("docstrings", [*data, *SETTINGS])
    from adalora.resolve import resolve_model

    path, _ = resolve_model(recipe)
    base: Any = result.task.build_model(path, recipe)
    layers = dict(base.named_modules())
    with torch.no_grad():
        for name, module in named_adapters(result.model):
            layers[name].weight += module.delta_weight()
        base.classifier.load_state_dict(result.model.classifier.state_dict())  # type: ignore[union-attr, arg-type]
    return dataclasses.replace(result, model=base)


def logits(result: RunResult) -> torch.Tensor:
    """Of the test set."""
    rows, model, task = result.task.splits["test"], result.model.eval(), result.task
    parts = []
    with torch.no_grad():
        for start in range(0, len(rows), 256):
            chunk = rows.select(range(start, min(start + 256, len(rows))))
            batch = task.processor.pad([{"input_ids": row["input_ids"]} for row in chunk], return_tensors="pt")
            parts.append(model(**batch).logits.float())
    return torch.cat(parts)


def agreement(result: RunResult, live: torch.Tensor) -> records.Record:
    """Accuracy of a merged model, and how far its logits are from the live ones, relative in norm."""
    found, labels = logits(result), torch.tensor(result.task.splits["test"]["labels"])
    return {
        "accuracy": float((found.argmax(1) == labels).float().mean()),
        "logits": float((found - live).norm() / live.norm()),
    }


def held_bytes(module: nn.Linear) -> int:
    """Bytes of a linear layer's weight with its scales, as it lies in memory."""
    if not is_quantized(module):
        return module.weight.nbytes
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        tables = [state.absmax] + ([state.state2.absmax] if state.nested else [])
        return int(weight.data.nbytes + sum(table.nbytes for table in tables))
    parts = [value for value in vars(weight).values() if isinstance(value, torch.Tensor)]
    scales = getattr(getattr(module, "state", None), "SCB", None)
    size = sum(part.nbytes for part in parts) if hasattr(weight, "qdata") else weight.data.nbytes
    assert dequantized(module).shape == (module.out_features, module.in_features)
    return int(size + (0 if scales is None else scales.nbytes))


def write_document() -> None:
    """The table in docs/quantized.md."""
    cells = records.load(RESULTS)
    lines = [
        "| base | linear weights | accuracy | dequantized: logits · accuracy | requantized | into the original |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in (name for name in KINDS if name in cells):
        cell = cells[name]
        ways = [
            f"{cell[way]['logits']:.1e} · {cell[way]['accuracy']:.3f}" if way in cell else "–"
            for way in ("dequantize", "requantize", "original")
        ]
        size = f"{cell['linear_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {name} | {size} | {cell['accuracy']:.3f} | " + " | ".join(ways) + " |")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.split("<!-- table -->\n")[0], text.split("<!-- end of table -->\n")[1]
    table = "\n".join(lines) + "\n"
    DOCUMENT.write_text(f"{before}<!-- table -->\n{table}<!-- end of table -->\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
