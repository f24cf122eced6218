"""The readers that `benchmarks.fuzz` feeds, each with files that it reads whole."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import adalora
from adalora.commands.comparing import _folders, _print, run_row
from adalora.commands.inspecting import inspect_facts
from adalora.commands.planning import count_rows
from adalora.commands.rows import rows_of_file
from adalora.commands.runs import read_trained
from adalora.commands.squeezing import cut, read_lora
from adalora.config import AdaLoraConfig
from adalora.errors import AdaLoraError, AdapterFileError
from adalora.htmlreport import write_report
from adalora.integrations.checkpoints import last_complete_checkpoint
from adalora.methods import build_method
from adalora.recipe import Recipe, load_recipe, recipe_names
from adalora.resuming import last_checkpoint, resumed, rewind
from adalora.runfiles import CHECKPOINTS
from adalora.study.design import load_study, study_names
from adalora.study.results import read_results
from adalora.yamlfiles import load_yaml
from benchmarks import victims
from benchmarks.board import FINAL, Board
from benchmarks.world import bert_config, make_world

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RUN = ("recipe.yaml", "result.json", "metrics.jsonl", "ranks.jsonl", "adapter/adapter_config.json")
CHECKPOINT = (
    "trainer_state.json",
    "model.safetensors",
    "adapter_model.safetensors",
    "weights.sha256",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)
ROWS = [{"text": "a cat", "label": "animal", "tokens": ["a", "cat"]}, {"text": "an elm", "label": "plant", "n": 3}]


@dataclass(frozen=True)
class Reader:
    """`files` are valid ones by name; `read` is given the folder that holds them, and which of them is damaged."""

    files: dict[str, bytes]
    damaged: tuple[str, ...]
    read: Callable[[Path, str], Any]
    share: float


def make_readers(folder: Path) -> dict[str, Reader]:
    """All of them, with the files that they read whole."""
    folder.mkdir(parents=True, exist_ok=True)
    return adapter_readers(folder) | lora_readers(folder) | text_readers() | run_readers(folder)


def adapter_readers(folder: Path) -> dict[str, Reader]:
    """An adapter of ours, and one as PEFT writes it, without our digests; and a configuration alone."""
    model = _trained()
    adalora.save_adapter(model, folder / "ours", warn=False)
    ours = {name: (folder / "ours" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    save_file(load_file(folder / "ours" / WEIGHTS), folder / "ours" / WEIGHTS, {"format": "pt"})
    foreign = ours | {WEIGHTS: (folder / "ours" / WEIGHTS).read_bytes()}
    config = json.dumps(AdaLoraConfig(max_rank={"a": 3}, target_parameters=0.1, budget="params").to_dict()).encode()
    return {
        "adapter of ours": Reader(ours, (CONFIG, WEIGHTS), _adapter, 3),
        "adapter of PEFT": Reader(foreign, (CONFIG, WEIGHTS), _adapter, 3),
        "configuration": Reader({"config.json": config}, ("config.json",), _configuration, 1),
    }


def lora_readers(folder: Path) -> dict[str, Reader]:
    """A LoRA of PEFT's to load, to squeeze, to inspect; what trained of a method that PEFT has no format for."""
    plain = build_method({"name": "lora", "r": 4, "target_modules": ["query"]})
    plain.save(plain.prepare(_bert()), folder / "lora", "bert", None)
    bitfit = build_method({"name": "bitfit"})
    bitfit.save(bitfit.prepare(_bert()), folder / "bitfit", "bert", None)
    houlsby = build_method({"name": "houlsby", "bottleneck": 2})
    houlsby.save(houlsby.prepare(_bert()), folder / "houlsby", "bert", None)
    names = (CONFIG, WEIGHTS)
    lora, biases, bottlenecks = (
        {name: (folder / kind / name).read_bytes() for name in names} for kind in ("lora", "bitfit", "houlsby")
    )
    return {
        "LoRA to load": Reader(lora, names, partial(_loaded, plain), 1),
        "LoRA to squeeze": Reader(lora, names, _squeezed, 1),
        "LoRA to inspect": Reader(lora, names, _inspected, 1),
        "biases to load": Reader(biases, names, partial(_loaded, bitfit), 1),
        "bottlenecks to load": Reader(bottlenecks, names, partial(_loaded, houlsby), 1),
    }


def text_readers() -> dict[str, Reader]:
    """Files that people write: recipes, studies, lists of runs, rows."""
    source = Path(adalora.__file__).parent
    names = sorted(recipe_names())[::7]
    recipes = {f"{i}.yaml": (source / "recipes" / f"{name}.yaml").read_bytes() for i, name in enumerate(names)}
    studies = {f"{name}.yaml": (source / "studies" / f"{name}.yaml").read_bytes() for name in study_names()}
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    rows = {
        "rows.jsonl": lines,
        "rows.json": json.dumps(ROWS).encode(),
        "rows.csv": b'text,label\n"a, cat",animal\nan elm,plant\n',
        "rows.tsv": b"text\tlabel\na cat\tanimal\n",
        "rows.txt": b"a cat\nan elm\n",
    }
    counted = rows | {"rows.jsonl.gz": gzip.compress(lines), "rows.parquet": _parquet()}
    setting = b"model.name_or_path=x\nmethod.init_r=4\ntraining={learning_rate: 1e-3}\ndata.train=a\n"
    return {
        "recipe": Reader(recipes, tuple(recipes), _recipes, 3),
        "setting": Reader({"settings.txt": setting}, ("settings.txt",), _settings, 1),
        "study": Reader(studies, tuple(studies), _studies, 2),
        "list of runs": Reader({"runs.yaml": b"runs: [a, b]\n"}, ("runs.yaml",), _list_of_runs, 1),
        "rows": Reader(rows, tuple(rows), _rows, 1),
        "rows to count": Reader(counted, tuple(counted), _counted, 1),
    }


def run_readers(folder: Path) -> dict[str, Reader]:
    """Files that we wrote: a run's folder as `adalora train` leaves it, its checkpoints, a study's results."""
    make_world(folder)
    out = folder / "run"
    out.mkdir()
    victims.command(out, Board())
    for file in (*out.glob("**/*.png"), *out.glob("**/*.html"), out / FINAL):
        file.unlink()
    names = [*RUN, "adapter/adapter_model.safetensors", "adapter/config.json"]
    run = {name: (out / name).read_bytes() for name in names}
    last = max((out / CHECKPOINTS).iterdir(), key=lambda path: path.stat().st_mtime)
    checkpoint = {f"{CHECKPOINTS}/checkpoint-8/{name}": (last / name).read_bytes() for name in CHECKPOINT}
    stopped = {name: run[name] for name in ("recipe.yaml", "metrics.jsonl", "ranks.jsonl")} | checkpoint
    stopped["result.json"] = json.dumps(json.loads(run["result.json"]) | {"complete": False}).encode()
    record = {"id": "t-a-1-0.1-0", "status": "finished", "task": "t", "arm": "a", "budget": 1.0, "seed": 0}
    results = "".join(json.dumps(record | {"seed": seed}) + "\n" for seed in range(3)).encode()
    return {
        "report of a run": Reader(run, (*RUN, "adapter/adapter_model.safetensors"), _report, 1),
        "run to compare": Reader(run, ("result.json", "recipe.yaml"), _compared, 1),
        "run to use": Reader(run, (*RUN, "adapter/config.json"), _used, 1),
        "run to resume": Reader(stopped, tuple(stopped), _resumed, 1),
        "checkpoint": Reader(checkpoint, tuple(checkpoint), _checkpoint, 1),
        "results of a study": Reader({"results.jsonl": results}, ("results.jsonl",), _results, 1),
    }


def _small() -> nn.Module:
    """The model of the adapters."""
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def _trained() -> nn.Module:
    """One that looks as if training were over, with ranks 3 and 1."""
    torch.manual_seed(0)
    model = adalora.inject(_small(), AdaLoraConfig(target_modules=["0", "2"], init_r=4, target_r=2, bias="lora_only"))
    for index, rank in ((0, 3), (2, 1)):
        module: Any = model[index]
        with torch.no_grad():
            module.lora_E.normal_()
            module.lora_E[rank:] = 0.0
        module.lora_keep[rank:] = False
    return model


def _adapter(folder: Path, _: str) -> None:
    """Read an adapter into a model, which an error leaves alone, and which afterwards computes numbers."""
    torch.manual_seed(1)
    model = _small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        adalora.load_adapter(model, folder)
    except AdaLoraError:
        after = model.state_dict()
        if after.keys() != before.keys() or any(not torch.equal(after[name], before[name]) for name in before):
            raise RuntimeError("an adapter that was refused has changed the model") from None
        raise
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise RuntimeError("numbers that are not finite were read")
    if not sum(p.numel() for p in model.parameters()) < 10_000:
        raise RuntimeError("the adapter is larger than its file")


def _bert() -> nn.Module:
    from transformers import BertForSequenceClassification

    torch.manual_seed(2)
    return BertForSequenceClassification(bert_config(12))


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a cat", "an elm"], "label": ["animal", "plant"]}), file)
    return file.getvalue()


def _loaded(method: Any, folder: Path, _: str) -> None:
    """Into a model, which an error leaves alone, and which afterwards is no larger than its file allows."""
    base = _bert()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    try:
        model = method.load(base, folder)
    except AdaLoraError:
        after = base.state_dict()
        if after.keys() != before.keys() or any(not torch.equal(after[name], before[name]) for name in before):
            raise RuntimeError("an adapter that was refused has changed the model") from None
        raise
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise RuntimeError("numbers that are not finite were read")


def _squeezed(folder: Path, _: str) -> None:
    lora = read_lora(folder)
    small, share = cut(lora, max(lora.size // 2, 1), True)
    if not all(value.isfinite().all() for A, B, _ in small.factors.values() for value in (A, B)) or share > 1.001:
        raise RuntimeError("numbers that cannot be were made of it")


def _inspected(folder: Path, _: str) -> None:
    facts, report = inspect_facts(folder)
    report.table(), report.heatmap(color=False), json.dumps(facts)


def _compared(folder: Path, _: str) -> None:
    row = run_row(folder)
    with redirect_stdout(io.StringIO()):
        _print([row])


def _counted(folder: Path, name: str) -> None:
    count_rows(folder / name)


def _configuration(folder: Path, _: str) -> None:
    """As a reader of JSON would: what is no object is none of AdaLoraConfig's business."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict):
        config = AdaLoraConfig.from_dict(values)
        if json.loads(json.dumps(config.to_dict())) != json.loads(
            json.dumps(AdaLoraConfig.from_dict(config.to_dict()).to_dict())
        ):
            raise RuntimeError("a configuration that does not come back")


def _recipes(folder: Path, name: str) -> None:
    recipe = load_recipe(str(folder / name))
    build_method(recipe.method)
    again = recipe.dump()
    if Recipe.model_validate(load_yaml(again)).dump() != again:  # not by ==, for which NaN is no equal of itself
        raise RuntimeError("a recipe that does not come back")


def _settings(folder: Path, name: str) -> None:
    lines = (folder / name).read_bytes().decode("utf-8", "replace").split("\n")
    load_recipe("text-classification", [line for line in lines if line])


def _studies(folder: Path, name: str) -> None:
    load_study(str(folder / name))


def _list_of_runs(folder: Path, name: str) -> None:
    _folders(folder / name)


def _rows(folder: Path, name: str) -> None:
    list(rows_of_file(folder / name, load_recipe("text-classification")))


def _report(folder: Path, _: str) -> None:
    write_report(folder)


def _used(folder: Path, _: str) -> None:
    read_trained(folder)


def _results(folder: Path, _: str) -> None:
    read_results(folder)


def _resumed(folder: Path, _: str) -> None:
    """What `adalora train --resume` reads before it builds anything. A torn checkpoint would be removed: not here."""
    with io.StringIO() as screen, resumed(folder):
        load_recipe(str(folder / "recipe.yaml"))
        if last_complete_checkpoint(folder / CHECKPOINTS):
            last_checkpoint(folder, Console(file=screen).print)
        rewind(folder, 8)


def _checkpoint(folder: Path, _: str) -> None:
    found = last_complete_checkpoint(folder / CHECKPOINTS)
    if found is None:
        raise AdapterFileError("passed over")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(found / name, weights_only=True)
