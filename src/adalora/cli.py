"""The command line. Heavy imports stay inside the commands, so that --help needs no torch."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from .errors import AdaLoraError

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


@app.command()
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
    result = run(loaded, out or free_folder(Path(recipe).stem), console)
    print_result(result, console)
    if result.stopped == "interrupted":
        raise typer.Exit(130)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder; an earlier demo there is replaced.")] = Path("runs/demo"),
    digits: Annotated[bool, typer.Option("--digits", help="Ten seconds of plain PyTorch instead.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of head, data order and dropout.")] = 0,
    settings: Settings = None,
) -> None:
    """Teach a real sentence encoder to tell a parameter's type from its description, in minutes, offline."""
    console = open_console()
    if digits:
        from .tasks.digits import run as run_digits

        result = run_digits(seed)
        console.print(result.table())
        console.print(Text.from_ansi(result.report.heatmap(color=console.is_terminal)))
        return
    from .demo import run_demo

    run_demo(out, seed, console, settings or ())


def open_console() -> Console:
    """Standard output, as it is: no colouring of numbers, no wrapping where lines go into a file."""
    return Console(highlight=False, soft_wrap=True)


def free_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2, … if that is taken."""
    number, folder = 1, Path("runs") / name
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def run_app() -> int:
    """Run the command line; 0 for success, 2 for a user's mistake, 1 for a bug of ours."""
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
