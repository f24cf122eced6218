"""The command line: which commands there are. What they do is in `commands`."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from .commands.comparing import COMPARE_EPILOG, compare
from .commands.exporting import EXPORT_EPILOG, MERGE_EPILOG, export, merge
from .commands.inspecting import INSPECT_EPILOG, inspect
from .commands.planning import PLAN_EPILOG, plan
from .commands.pushing import PUSH_EPILOG, push
from .commands.recipes import CHECK_EPILOG, COPY_EPILOG, RECIPES_EPILOG, check, copy, recipes
from .commands.reporting import REPORT_EPILOG, report
from .commands.squeezing import SQUEEZE_EPILOG, squeeze
from .commands.training import DEMO_EPILOG, TRAIN_EPILOG, demo, train
from .commands.using import EVALUATE_EPILOG, PREDICT_EPILOG, evaluate, predict
from .errors import AdaLoraError

_HELP = {"help_option_names": ["-h", "--help"]}
_TRAINING, _USING, _RUNS = "Train", "Use what was trained", "Look at runs"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
    help="Fine-tune pre-trained models on a small parameter budget with AdaLoRA.",
    epilog="Begin with: adalora demo. Exit codes: 0 done, 1 a bug of ours, 2 a mistake in the input.",
)
recipes_app = typer.Typer(invoke_without_command=True, epilog=RECIPES_EPILOG, context_settings=_HELP)
config_app = typer.Typer(no_args_is_help=True, help="Check a recipe.", context_settings=_HELP)

for _command, _epilog, _panel, _short in (
    (plan, PLAN_EPILOG, _TRAINING, "Parameters, file, memory, time, schedule; without training."),
    (train, TRAIN_EPILOG, _TRAINING, "Train a recipe."),
    (demo, DEMO_EPILOG, _TRAINING, "A real task in minutes, offline."),
    (evaluate, EVALUATE_EPILOG, _USING, "Score a trained adapter."),
    (predict, PREDICT_EPILOG, _USING, "Answer texts, a file or standard input."),
    (export, EXPORT_EPILOG, _USING, "Write plain LoRA, a whole model, or PEFT's AdaLoRA."),
    (merge, MERGE_EPILOG, _USING, "Write a whole model."),
    (squeeze, SQUEEZE_EPILOG, _USING, "Cut any LoRA to a budget."),
    (push, PUSH_EPILOG, _USING, "Upload a run to the hub."),
    (inspect, INSPECT_EPILOG, _RUNS, "Ranks and totals of an adapter, ours or PEFT's."),
    (report, REPORT_EPILOG, _RUNS, "Write a run's HTML page anew."),
    (compare, COMPARE_EPILOG, _RUNS, "Finished runs in one table."),
):
    app.command(epilog=_epilog, rich_help_panel=_panel, short_help=_short)(_command)
recipes_app.callback()(recipes)
recipes_app.command(epilog=COPY_EPILOG)(copy)
config_app.command(epilog=CHECK_EPILOG)(check)
app.add_typer(recipes_app, name="recipes", rich_help_panel=_TRAINING, short_help="List or copy built-in recipes.")
app.add_typer(config_app, name="config", rich_help_panel=_TRAINING, short_help="Check a recipe.")


def _print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(f"adalora {importlib.metadata.version('adalora')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run_app() -> int:
    """Run the command line; 0 for success, 2 for a user's mistake, 1 for a bug of ours."""
    import logging

    from rich.console import Console
    from rich.logging import RichHandler

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a label or a path may hold what a C locale cannot show
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False, highlighter=None)
    logging.getLogger("adalora").addHandler(handler)
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # which tell of kernels for other machines
        logging.getLogger(library).setLevel(logging.ERROR)
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
