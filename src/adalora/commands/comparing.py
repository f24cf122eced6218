"""`adalora compare`: finished runs side by side, or a whole study from one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .console import AsJson, importing, print_json, print_table

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..study.grid import Grid
    from ..study.ledger import Ledger

COMPARE_EPILOG = (
    "Examples: adalora compare runs/demo/adalora runs/demo/lora · "
    "adalora compare first-cut --data data --out studies/first --workers 2 · FILE may also hold runs: [FOLDER, …]"
)
# Of the 22M encoder on one CPU core, and of a task whose data are not there yet: until a run has been timed.
_SECONDS_A_STEP, _SECONDS_A_RUN, _STEPS = 0.35, 25, 300


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="FILE|FOLDER...", help="A study (file or built-in name), or folders of finished runs."),
    ],
    out: Annotated[Path | None, typer.Option(help="The study's folder; an earlier one there goes on.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each run; its share of the cores if not given.")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder that the recipes' files are relative to.")] = Path(),
    only: Annotated[str | None, typer.Option(metavar="KEY=VALUE,…", help="Some runs: task, arm, budget, seed.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, count the runs, train nothing.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Tables and plots of what is there, train nothing.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do failed runs again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a study (arms × budgets × tasks × seeds) to its table, or put finished runs into one.

    Folders of runs: each row is one run as its result.json has it. A study: learning rates are chosen on
    validation scores, test scores are reported, with intervals and tests. Killed, the same command goes on.
    """
    if not _is_study(sources):
        if out or threads or only or dry_run or table or retry_failed:
            raise ConfigError("these sources are finished runs; --out, --only and the like are for a study file.")
        rows = [run_row(folder) for source in sources for folder in _folders(Path(source))]
        print_json(rows) if as_json else _print(rows)
        return
    if out is None:
        raise ConfigError(f"{sources[0]!r} is a study; say with --out which folder is its own.")
    with importing():
        from ..screen import quiet
    quiet()
    grid = study_grid(sources[0], out, data)
    if dry_run:
        _print_estimate(grid, workers, only)
        return
    if table:
        _write_tables(study_ledger(grid), as_json)
        return
    from ..study.ledger import parse_only
    from ..study.runner import Runner

    runner = Runner(grid, workers, typer.echo, parse_only(only, grid), threads)
    _write_tables(runner.run(retry_failed), as_json)


def _is_study(sources: list[str]) -> bool:
    """One file that is no list of runs, or the name of a built-in study."""
    if len(sources) != 1 or Path(sources[0]).is_dir():
        return False
    if Path(sources[0]).is_file():
        return _runs_of(Path(sources[0])) is None
    from ..study.design import study_names

    return sources[0] in study_names()


def study_grid(source: str, out: Path, data: Path = Path()) -> Grid:
    """A study with its folder. Raises ConfigError for one that cannot be meant."""
    from ..study.design import load_study
    from ..study.grid import Grid, check_arms

    study = load_study(source)
    check_arms(study, source)
    return Grid(study, out, data, _unit, source)


def _unit(recipe: Recipe) -> int:
    """Sum of (in + out) over the matrices that AdaLoRA adapts with this recipe."""
    from ..methods import build_method
    from ..resolve import resolve_model
    from .skeleton import build, shapes_of

    model = build_method(recipe.method).prepare(build(resolve_model(recipe)[0], recipe, 2))
    return sum(map(sum, shapes_of(model)[0].values()))


def study_ledger(grid: Grid) -> Ledger:
    """What its folder holds so far."""
    from ..study.ledger import Ledger
    from ..study.results import read_results

    return Ledger(grid, read_results(grid.out))


def _print_estimate(grid: Grid, workers: int, only: str | None) -> None:
    """How many runs, and how long: by the runs that are done, or else by the number of their steps."""
    from ..resolve import DEFAULTS
    from ..study.ledger import parse_only
    from ..study.runner import check_grid, seconds_left, shown_time
    from .planning import run_steps

    check_grid(grid)
    ledger = study_ledger(grid)
    missing, study = ledger.missing(parse_only(only, grid)), grid.study
    rates = len(next(iter(study.arms.values())).learning_rates)
    sizes = (len(study.tasks), len(study.budgets), len(study.arms), rates, len(study.seeds))
    names = ("tasks", "budgets", "arms", "learning rates", "seeds")
    typer.echo(" × ".join(f"{size} {name}" for size, name in zip(sizes, names, strict=True)))
    typer.echo(f"{len(ledger.records)} runs done, {len(missing)} to do, more where a best rate is at an edge")
    seconds = seconds_left(ledger, workers, parse_only(only, grid))
    if seconds is None:
        recipes = [grid.placed(run, {}) for run in missing]
        steps = [run_steps(recipe, DEFAULTS | recipe.training) or _STEPS for recipe in recipes]
        typer.echo(f"about {sum(steps):,} steps; a guess for the 22M encoder on CPU cores, until a run has been timed:")
        seconds = (sum(steps) * _SECONDS_A_STEP + len(steps) * _SECONDS_A_RUN) / workers
    typer.echo(f"about {shown_time(seconds)} with --workers {workers}")


def _write_tables(ledger: Ledger, as_json: bool) -> None:
    from ..study.summary import summarize
    from ..study.tables import write_tables

    summary = summarize(ledger)
    text = write_tables(summary, ledger.grid.out)
    print_json(summary) if as_json else typer.echo(text)


def run_row(folder: Path) -> dict[str, Any]:
    """What one finished run says of itself. Raises AdapterFileError if it did not finish."""
    from ..errors import AdapterFileError
    from ..jsonfiles import believed, read_object
    from ..recipe import load_recipe

    if not (folder / "result.json").is_file():
        raise AdapterFileError(f"{str(folder)!r} has no result.json: no run has finished there. Leave it out.")
    result, recipe = read_object(folder / "result.json"), load_recipe(str(folder / "recipe.yaml"))
    with believed(folder):
        row = {
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
        # The table has a format for each, and one that fails there would not say which run it was.
        sizes = [row["parameters"][key] for key in ("final", "head")]
        for value in (*row["scores"].values(), *sizes, row["steps"], row["seconds"]):
            if not isinstance(value, int | float):
                raise TypeError(f"result.json has {value!r} where a number belongs")
            float(value)
    return row


def _folders(source: Path) -> list[Path]:
    """The folder itself, or the `runs` of a YAML file, relative to it."""
    if source.is_dir():
        return [source]
    if not source.is_file():
        from ..study.design import known_studies

        raise ConfigError(
            f"{str(source)!r} is not there; give folders of runs, a YAML file with runs: [FOLDER, …], or a study; "
            + known_studies(str(source))
        )
    runs = _runs_of(source)
    if runs is None:
        raise ConfigError(f"{str(source)!r} is a study; give it alone, with --out FOLDER.")
    return [source.parent / run for run in runs]


def _runs_of(file: Path) -> list[str] | None:
    """The `runs` that a YAML file lists; None if it is about something else. Raises ConfigError."""
    import yaml

    from ..yamlfiles import load_yaml

    try:
        value = load_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r} is not valid YAML: {error}") from error
    if isinstance(value, dict) and {"arms", "tasks"} & set(value):
        return None
    runs = value.get("runs") if isinstance(value, dict) else None
    if not isinstance(runs, list) or not runs or not all(isinstance(run, str) for run in runs) or len(value) > 1:
        raise ConfigError(
            f"{str(file)!r} must hold runs: [FOLDER, …] and nothing else, or be a study with arms and tasks; it holds "
            f"{value!r:.60}."
        )
    return runs


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
