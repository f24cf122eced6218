"""`adalora train` and `adalora demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .console import RecipeName, Settings, exit_if_stopped, importing, open_console, output_folder

TRAIN_EPILOG = (
    "Example: adalora train text-classification --set data.train=train.jsonl --set training.learning_rate=1e-3\n\n"
    "Exit codes: 0 done; 1 a bug, please report it; 2 a mistake in the input or a run that failed; 130 and 143 "
    "stopped by Ctrl-C or SIGTERM, with everything saved."
)
DEMO_EPILOG = "Example: adalora demo --digits"
_DEMO_FOLDER = Path("runs/demo")


def train(
    recipe: RecipeName,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; runs/NAME if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of head, data order and dropout.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out, or in RECIPE if that is a run.")
    ] = False,
    log_to: Annotated[
        list[str] | None,
        typer.Option("--log-to", metavar="NAME", help="Also log to tensorboard, wandb, mlflow, trackio …; repeatable."),
    ] = None,
) -> None:
    """Train a recipe: plan, progress, scores, and a folder with adapter, record and pictures."""
    from ..claiming import require_one_process
    from ..recipe import load_recipe

    require_one_process()  # before each of them makes a folder
    settings = [*(settings or ()), *([f"training.report_to=[{', '.join(log_to)}]"] if log_to else ())]
    file = Path(recipe, "recipe.yaml") if Path(recipe, "recipe.yaml").is_file() else None  # a run's folder
    loaded = load_recipe(str(file or recipe), settings, seed)
    if resume:
        out = _run_to_resume(recipe, file, out)
    with importing():
        from ..summary import print_result
        from ..train import run
    console = open_console()
    with output_folder(out, Path(recipe).stem) as folder:
        result = run(loaded, folder, console, resume=resume)
    print_result(result, console)
    exit_if_stopped(result.stopped)


def demo(
    out: Annotated[Path, typer.Option(help="Output folder; an earlier demo there is replaced.")] = _DEMO_FOLDER,
    digits: Annotated[bool, typer.Option("--digits", help="Ten seconds of plain PyTorch instead.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of head, data order and dropout.")] = 0,
    settings: Settings = None,
) -> None:
    """Teach a real sentence encoder to tell a parameter's type from its description, in minutes, offline."""
    if digits and (settings or out != _DEMO_FOLDER):
        raise ConfigError("demo --digits has no recipe and writes no files; leave out --set and --out.")
    from rich.text import Text

    console = open_console()
    if digits:
        from ..tasks.digits import run as run_digits

        result = run_digits(seed)
        console.print(result.table())
        console.print(Text.from_ansi(result.report.heatmap(color=console.is_terminal)))
        return
    with importing():
        from ..demo import run_demo
    for arm in run_demo(out, seed, console, settings or ()).values():
        exit_if_stopped(getattr(arm, "stopped", None))


def _run_to_resume(recipe: str, file: Path | None, out: Path | None) -> Path:
    """The folder of the run to go on with. Raises ConfigError where none is meant."""
    folder = out or (file.parent if file else Path("runs") / Path(recipe).stem)
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(
            f"--resume: {str(folder)!r} holds no run that was interrupted. Name its folder with --out, or leave "
            "--resume out to begin anew."
        )
    return folder
