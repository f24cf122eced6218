"""`adalora evaluate` and `adalora predict`: what a trained adapter scores and answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AdapterFileError, ConfigError, DataError
from .console import AsJson, Model, Settings, Source, importing, open_console, print_json, refuse_existing

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .rows import Row
    from .runs import Trained

EVALUATE_EPILOG = "Example: adalora evaluate runs/mine --data other.jsonl"
PREDICT_EPILOG = (
    'Examples: adalora predict runs/mine "one text" "another" · adalora predict runs/mine < lines > out.jsonl\n\n'
    "A TEXT or line that begins with { is a row with the recipe's columns, e.g. "
    '{"question": "Who?", "context": "It was Ada."}; any other is the one text that the task reads.'
)


def evaluate(
    folder: Source,
    data: Annotated[Path | None, typer.Option(help="Score the rows of this file, with the recipe's columns.")] = None,
    split: Annotated[str | None, typer.Option(help="train, validation or test of the recipe's own data.")] = None,
    model: Model = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Score a trained adapter on its test set (validation where there is none), or on another file."""
    if data is not None and split is not None:
        raise ConfigError("--data names a file and --split a part of the recipe's own data; give one of them.")
    with importing():
        from ..screen import quiet
        from .runs import read_trained
    quiet()
    trained = read_trained(folder, model, settings or ())
    recipe = trained.recipe if data is None else _with_file(trained, data)
    scores, split, rows = _scores(trained, recipe, "test" if data else split)
    if as_json:
        print_json({"split": str(data or split), "rows": rows, "scores": scores})
        return
    open_console().print(f"{data or split}, {rows:,} rows", markup=False)
    for name, value in scores.items():
        typer.echo(f"  {name:<20} {value:.4f}")


def predict(
    folder: Source,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Inputs, or a row as JSON.")] = None,
    file: Annotated[Path | None, typer.Option(help="Inputs: .jsonl, .json, .csv, .tsv, or .txt by line.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write there instead of to standard output.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that go through the model at once.")] = 32,
    model: Model = None,
    settings: Settings = None,
) -> None:
    """Answer texts, a file or standard input with a trained adapter: one JSON object for each, in order."""
    if texts and file:
        raise ConfigError("both TEXT and --file are given; give one of them.")
    if not texts and not file and sys.stdin.isatty():
        raise ConfigError(
            'there is nothing to predict; give a TEXT, --file, or pipe lines in: adalora predict RUN "text"'
        )
    if out is not None:
        refuse_existing(out, "--out")
    with importing():
        from ..screen import quiet
        from .rows import batches
        from .runs import read_trained
    quiet()
    trained = read_trained(folder, model, settings or ())
    parts = batches(_rows(texts, file, trained.recipe), batch_size)
    first = next(parts, None)  # mistakes in the input before the model is loaded
    if first is None:
        raise DataError(f"there is nothing to predict in {str(file) if file else 'standard input'!r}.")
    task = trained.task()
    adapted = trained.model(task)
    answers = (answer for part in _chain(first, parts) for answer in task.predict(adapted, part))
    _write(answers, out)


def _rows(texts: list[str] | None, file: Path | None, recipe: Recipe) -> Iterable[Row]:
    from .rows import rows_of_file, rows_of_lines

    if texts:
        return rows_of_lines(texts, recipe, "TEXT")
    return rows_of_file(file, recipe) if file else rows_of_lines(sys.stdin, recipe, "standard input")


def _chain(first: Any, rest: Iterable[Any]) -> Iterable[Any]:
    yield first
    yield from rest


def _write(answers: Iterable[dict[str, Any]], out: Path | None) -> None:
    if out is None:
        for answer in answers:
            typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    written = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8") as lines:
            for answer in answers:
                written += 1
                lines.write(json.dumps(answer, ensure_ascii=False) + "\n")
    except OSError as error:
        raise AdapterFileError(f"cannot write {str(out)!r}: {error.strerror}; choose another --out.") from error
    typer.echo(f"{written} answers in {out}")


def _with_file(trained: Trained, file: Path) -> Recipe:
    """The recipe with `file` as its test set.

    Where classes are known from the training data alone, that is read, too; any other task reads the file only.
    """
    if not file.is_file():
        raise DataError(f"--data is {str(file)!r}, and there is no such file.")
    data, files = trained.recipe.data, {"test": str(file)}
    if data.name is not None:
        raise ConfigError(
            f"the recipe's data is {data.name!r} from the hub, with which a file cannot be mixed; use --split, or "
            "adalora predict --file."
        )
    if not trained.labels:
        files |= {"train": str(file), "validation": str(file)}
    return trained.recipe.model_copy(update={"data": data.model_copy(update=files)})


def _scores(trained: Trained, recipe: Recipe, split: str | None) -> tuple[dict[str, float], str, int]:
    """(all metrics of the task, the split, its rows)."""
    import tempfile

    from ..resolve import resolve_training, training_arguments
    from ..tasks.base import build_task
    from ..trainer import build_trainer

    task = build_task(trained.path, recipe)
    if trained.labels and list(task.labels) != list(trained.labels):
        raise DataError(
            f"the training data named in the recipe has the classes {', '.join(task.labels)}; the adapter was trained "
            f"for {', '.join(trained.labels)}. Restore the data that it was trained on."
        )
    split = split or ("test" if "test" in task.splits else "validation")
    if split not in task.splits:
        raise ConfigError(f"--split is {split!r}; this run has {', '.join(task.splits)}.")
    with tempfile.TemporaryDirectory() as folder:  # a Trainer wants one
        arguments = training_arguments(_quietly(resolve_training(recipe, task)), Path(folder), task)
        trainer = build_trainer(trained.model(task), arguments, task, [])
        return task.evaluate(trainer, split), split, len(task.splits[split])


def _quietly(recipe: Recipe) -> Recipe:
    """The recipe for a Trainer that trains nothing: no loggers, no checkpoints to choose from."""
    off = {"report_to": "none", "load_best_model_at_end": False, "eval_strategy": "no", "save_strategy": "no"}
    return recipe.model_copy(update={"training": recipe.training | off})
