"""What the commands share: the screen, the output folder, options that mean the same everywhere."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import ConfigError

EXIT_CODES = {"interrupted": 130, "terminated": 143}  # as the shell names death by SIGINT and SIGTERM


def complete_recipe(incomplete: str) -> list[str]:
    """Built-in recipes that begin so, for the shell."""
    from ..recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value; repeatable.")
]
RecipeName = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a built-in recipe.", autocompletion=complete_recipe)
]
Model = Annotated[
    str | None, typer.Option(help="Base model, a hub name or a folder, where it is not where the adapter says.")
]
Source = Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, or an adapter's.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


class OutputConsole(Console):
    """Standard output, whose reader may leave early: `adalora train … | head -1` still ends with its adapter."""

    def on_broken_pipe(self) -> None:
        """Print no more, and go on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def importing() -> Iterator[None]:
    """Around the first import of the libraries that train. What they make stays: looking through it for garbage again
    and again takes a quarter of the start, and later a second of each training, which begins by collecting."""
    if "transformers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def open_console() -> Console:
    """Standard output, as it is: no colouring of numbers, no wrapping where lines go into a file."""
    console = OutputConsole(highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    """Aligned columns, the first `left` of them to the left; never cut, whatever the width of the screen."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())


def exit_if_stopped(reason: str | None) -> None:
    """Exit as a process does that the same signal ended."""
    if reason in EXIT_CODES:
        raise typer.Exit(EXIT_CODES[reason])


@contextmanager
def output_folder(out: Path | None, name: str) -> Iterator[Path]:
    """`out`, or a free folder under runs/, which disappears again if the run leaves nothing in it."""
    folder = out or free_folder(name)
    try:
        yield folder
    finally:
        if out is None:
            with suppress(OSError):  # not empty
                folder.rmdir()
                folder.parent.rmdir()


def free_folder(name: str) -> Path:
    """Make runs/NAME, or runs/NAME-2, … if that is taken: two runs that begin at once get one each."""
    number, folder = 1, Path("runs") / name
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            if Path("runs").is_file():
                raise ConfigError("'runs' is a file; choose an output folder with --out.") from error
            number += 1
            folder = Path("runs") / f"{name}-{number}"
        except OSError as error:
            raise ConfigError(f"cannot make {str(folder)!r}: {error.strerror}; choose one with --out.") from error


def refuse_existing(path: Path, option: str) -> None:
    """Raise ConfigError if `path` holds something that a command would write over."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        state = "exists" if path.is_file() else "is not empty"
        raise ConfigError(f"{str(path)!r} {state}; choose another {option}, or remove it.")
