"""The command line. Heavy imports stay inside the commands, so that --help needs no torch."""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from .errors import AdaLoraError, ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune pre-trained models on a small parameter budget with AdaLoRA.",
)


Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value; repeatable.")
]


_DEMO_FOLDER = Path("runs/demo")
_EXIT_CODES = {"interrupted": 130, "terminated": 143}  # as the shell names death by SIGINT and SIGTERM
_TRAIN_EPILOG = (
    "Example: adalora train text-classification --set data.train=train.jsonl --set training.learning_rate=1e-3\n\n"
    "Exit codes: 0 done; 1 a bug, please report it; 2 a mistake in the input or a run that failed; 130 and 143 "
    "stopped by Ctrl-C or SIGTERM, with everything saved."
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adalora {importlib.metadata.version('adalora')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog=_TRAIN_EPILOG)
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in recipe.")],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; runs/NAME if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of head, data order and dropout.")] = None,
) -> None:
    """Train a recipe: plan, progress, scores, and a folder with adapter, record and pictures."""
    from .recipe import load_recipe

    loaded = load_recipe(recipe, settings or (), seed)
    from .summary import print_result
    from .train import run

    console = open_console()
    with output_folder(out, Path(recipe).stem) as folder:
        result = run(loaded, folder, console)
    print_result(result, console)
    exit_if_stopped(result.stopped)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder; an earlier demo there is replaced.")] = _DEMO_FOLDER,
    digits: Annotated[bool, typer.Option("--digits", help="Ten seconds of plain PyTorch instead.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of head, data order and dropout.")] = 0,
    settings: Settings = None,
) -> None:
    """Teach a real sentence encoder to tell a parameter's type from its description, in minutes, offline."""
    if digits and (settings or out != _DEMO_FOLDER):
        raise ConfigError("demo --digits has no recipe and writes no files; leave out --set and --out.")
    console = open_console()
    if digits:
        from .tasks.digits import run as run_digits

        result = run_digits(seed)
        console.print(result.table())
        console.print(Text.from_ansi(result.report.heatmap(color=console.is_terminal)))
        return
    from .demo import run_demo

    for arm in run_demo(out, seed, console, settings or ()).values():
        exit_if_stopped(getattr(arm, "stopped", None))


@app.command()
def recipes() -> None:
    """List the built-in recipes."""
    from .recipe import recipe_names

    names = recipe_names()
    for name in names:
        text = (resources.files(__package__) / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        typer.echo(f"{name:<{max(map(len, names))}}  {text.splitlines()[0].lstrip('# ')}")


def exit_if_stopped(reason: str | None) -> None:
    """Exit as a process does that the same signal ended."""
    if reason in _EXIT_CODES:
        raise typer.Exit(_EXIT_CODES[reason])


class OutputConsole(Console):
    """Standard output, whose reader may leave early: `adalora train … | head -1` still ends with its adapter."""

    def on_broken_pipe(self) -> None:
        """Print no more, and go on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_console() -> Console:
    """Standard output, as it is: no colouring of numbers, no wrapping where lines go into a file."""
    console = OutputConsole(highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


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


def run_app() -> int:
    """Run the command line; 0 for success, 2 for a user's mistake, 1 for a bug of ours."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a label or a path may hold what a C locale cannot show
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False, highlighter=None)
    logging.getLogger("adalora").addHandler(handler)
    try:
        app()
    except AdaLoraError as error:
        console.print(f"adalora: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except KeyboardInterrupt:
        sys.stderr.write("adalora: interrupted\n")
        return 130
    return 0
