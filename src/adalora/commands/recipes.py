"""`adalora recipes`, `adalora recipes copy` and `adalora config check`."""

from __future__ import annotations

import itertools
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from .console import RecipeName, Settings, complete_recipe, refuse_existing

RECIPES_EPILOG = "Example: adalora recipes copy text-classification mine.yaml"
COPY_EPILOG = RECIPES_EPILOG
CHECK_EPILOG = "Example: adalora config check mine.yaml --set data.trian=x.jsonl"


def recipes(context: typer.Context) -> None:
    """List the built-in recipes; `recipes copy` makes a file of one."""
    if context.invoked_subcommand is not None:
        return
    from ..recipe import recipe_names

    names = sorted(recipe_names(), key=lambda name: ("/" in name, name))  # those in folders are the special ones
    for name in names:
        typer.echo(f"{name:<{max(map(len, names))}}  {_purpose(name)}")


def copy(
    name: Annotated[str, typer.Argument(help="A built-in recipe.", autocompletion=complete_recipe)],
    dest: Annotated[Path | None, typer.Argument(help="File or folder; NAME.yaml here if not given.")] = None,
) -> None:
    """Copy a built-in recipe into a file of your own."""
    from ..errors import AdapterFileError, ConfigError, did_you_mean
    from ..recipe import recipe_names

    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {name!r}; " + did_you_mean(name, recipe_names()))
    file = dest or Path()
    if file.is_dir():
        file = file / f"{Path(name).name}.yaml"
    refuse_existing(file, "file name")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_text(name), encoding="utf-8")
    except OSError as error:
        raise AdapterFileError(f"cannot write {str(file)!r}: {error.strerror}; choose another place.") from error
    typer.echo(f"{file}; run it with: adalora train {file}")


def check(recipe: RecipeName, settings: Settings = None) -> None:
    """Check a recipe without training, and print it with every default filled in."""
    from ..recipe import load_recipe

    loaded = load_recipe(recipe, settings or ())
    from ..train import check as check_run

    method = check_run(loaded, Path())
    from ..resolve import resolve_recipe, resolve_without_data

    typer.echo(resolve_without_data(resolve_recipe(loaded, method)).dump().rstrip())


def _purpose(name: str) -> str:
    """The first sentence of the comment on top."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), _text(name).splitlines())
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].rstrip(".") + "."


def _text(name: str) -> str:
    return (resources.files("adalora") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
