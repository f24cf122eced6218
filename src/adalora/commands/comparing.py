"""`adalora compare`: finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import AsJson, print_json, print_table

COMPARE_EPILOG = "Example: adalora compare runs/demo/adalora runs/demo/lora · FILE.yaml holds runs: [FOLDER, …]"


def compare(
    sources: Annotated[
        list[Path], typer.Argument(metavar="FILE|FOLDER...", help="Folders of finished runs, or a YAML list of them.")
    ],
    as_json: AsJson = False,
) -> None:
    """Put the scores, parameters and times of finished runs into one table.

    Each row is one run as its result.json has it: nothing is trained, averaged over seeds or tested for
    significance.
    """
    rows = [run_row(folder) for source in sources for folder in _folders(source)]
    print_json(rows) if as_json else _print(rows)


def run_row(folder: Path) -> dict[str, Any]:
    """What one finished run says of itself. Raises AdapterFileError if it did not finish."""
    from ..errors import AdapterFileError
    from ..recipe import load_recipe
    from .runs import read_json

    if not (folder / "result.json").is_file():
        raise AdapterFileError(f"{str(folder)!r} has no result.json: no run has finished there. Leave it out.")
    result, recipe = read_json(folder / "result.json"), load_recipe(str(folder / "recipe.yaml"))
    return {
        "run": str(folder),
        "method": recipe.method["name"],
        "seed": recipe.seed,
        "split": f"{result['split']} ({result['rows'][result['split']]})",
        "metric": result["metric"],
        "score": result["scores"].get(result["metric"]),
        "scores": result["scores"],
        "parameters": result["parameters"],
        "steps": result["steps"],
        "seconds": result["train_seconds"],
        "stopped": result["stopped"],
    }


def _folders(source: Path) -> list[Path]:
    """The folder itself, or the `runs` of a YAML file, relative to it."""
    import yaml

    if source.is_dir():
        return [source]
    if not source.is_file():
        raise ConfigError(f"{str(source)!r} is not there; give folders of runs, or a YAML file with runs: [FOLDER, …].")
    try:
        value = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(source)!r} is not valid YAML: {error}") from error
    runs = value.get("runs") if isinstance(value, dict) else None
    if not isinstance(runs, list) or not runs or not all(isinstance(run, str) for run in runs) or len(value) > 1:
        raise ConfigError(f"{str(source)!r} must hold runs: [FOLDER, …] and nothing else; it holds {value!r:.60}.")
    return [source.parent / run for run in runs]


def _print(rows: list[dict[str, Any]]) -> None:
    metrics = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    lines = []
    for row in rows:
        scores = (f"{row['scores'][name]:.4f}" if name in row["scores"] else "–" for name in metrics)
        count, steps = row["parameters"], f"{row['steps']:,}{'*' if row['stopped'] else ''}"
        sizes = (f"{count['final']:,}", f"{count['head']:,}", steps, f"{row['seconds']:.0f}")
        lines.append((row["run"], row["method"], str(row["seed"]), row["split"], *scores, *sizes))
    columns = ("run", "method", "seed", "scored on", *metrics, "parameters", "head", "steps", "seconds")
    print_table(columns, lines, left=4)
    if any(row["stopped"] for row in rows):
        typer.echo("* ended before its last step")
    if len({row["split"] for row in rows}) > 1:
        typer.echo("These runs were not scored on the same rows; their scores do not compare.")
