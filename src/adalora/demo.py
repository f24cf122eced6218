"""The main job on real input: a frozen sentence encoder learns a new task, offline, in minutes.

Beside AdaLoRA it runs what a reader should hold it against: a linear probe, a bag of words, and plain LoRA
with the same number of final parameters.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .errors import ConfigError
from .recipe import load_recipe
from .result import RunResult
from .screen import quiet
from .summary import print_heatmap
from .tasks.baselines import BaselineResult, bag_of_words, linear_probe
from .tasks.docstrings import load, write_jsonl
from .tasks.encoder import packaged_encoder
from .train import check, run

SENTENCES = (
    "Number of jobs to run in parallel.",
    "If True, the input is overwritten to save memory.",
    "Function called after each iteration with the current parameter vector.",
)


def run_demo(out: Path, seed: int, console: Console, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Harvest, probe, train AdaLoRA and LoRA, and print the table. Raises AdaLoraError.

    `settings` go on top of both recipes. Returns {row name: BaselineResult or RunResult}. An earlier demo in
    `out` is replaced.
    """
    quiet()
    for name in ("docstrings", "docstrings-lora"):  # a mistake shows before anything is removed or trained
        check(load_recipe(name, settings, seed), out)
    _make_room(out)
    encoder = packaged_encoder()
    data = load()
    files = write_jsonl(out / "data", data)
    versions = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    console.print(
        f"[bold]Task[/] tell a parameter's type from its description: {len(data.train):,} training and "
        f"{len(data.test):,} test texts\n  from the documentation of {versions}; classes: {' '.join(data.labels)}",
    )
    results: dict[str, BaselineResult | RunResult] = {}
    results["linear probe"] = _shown("linear probe", linear_probe(encoder, data.train, data.test), console)
    results["bag of words"] = _shown("bag of words", bag_of_words(data.train, data.test), console)
    settings = [f"data.train={files[0]}", f"data.validation={files[1]}", f"data.test={files[1]}", *settings]
    console.print("[bold]AdaLoRA[/]")
    adalora = run(load_recipe("docstrings", settings, seed), out / "adalora", console)
    if adalora.stopped:
        return results | {"AdaLoRA": adalora}
    console.print("[bold]LoRA[/] (PEFT), as many parameters")
    same_size = f"method.parameters={adalora.count.final}"
    lora = run(load_recipe("docstrings-lora", [*settings, same_size], seed), out / "lora", console)
    results |= {"LoRA": lora, "AdaLoRA": adalora}
    console.print(_table(results))
    print_heatmap(adalora, console)
    answers = adalora.task.predict(adalora.model, [{"text": sentence} for sentence in SENTENCES])
    for sentence, answer in zip(SENTENCES, answers, strict=True):
        console.print(f"  {answer['label']:>9}  ← {sentence}")
    console.print(f"Everything is in {out}: adapters, recipes that rerun, logs and pictures.")
    return results


def _make_room(out: Path) -> None:
    if any(path.is_file() for path in (out, *out.parents)):
        raise ConfigError(f"{str(out)!r} is a file, or within one; choose another folder with --out.")
    if out.exists() and any(out.iterdir()):
        if not (out / "adalora" / "recipe.yaml").exists() and not (out / "data").is_dir():
            raise ConfigError(f"{str(out)!r} holds something that is no demo; choose another folder with --out.")
        shutil.rmtree(out)


def _shown(name: str, result: BaselineResult, console: Console) -> BaselineResult:
    console.print(
        f"  {name}: accuracy {result.accuracy:.3f}, macro F1 {result.macro_f1:.3f} ({result.seconds:.0f} s)",
    )
    return result


def _table(results: dict[str, BaselineResult | RunResult]) -> Table:
    table = Table(title="test set, one seed")
    for column in ("", "accuracy", "macro F1", "adapter parameters", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in results.items():
        if isinstance(result, RunResult):
            scores, size = (result.scores["accuracy"], result.scores["macro_f1"]), f"{result.count.final:,}"
        else:
            scores, size = (result.accuracy, result.macro_f1), "–"
        table.add_row(name, f"{scores[0]:.3f}", f"{scores[1]:.3f}", size, f"{result.seconds:.0f}")
    return table
