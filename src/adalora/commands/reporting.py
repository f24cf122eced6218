"""`adalora report`: the HTML page of a run, made anew from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

REPORT_EPILOG = "Example: adalora report runs/mine"


def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Write report.html, one page without a network: curves, budget, ranks over time, table, configuration."""
    from ..htmlreport import write_report

    typer.echo(str(write_report(folder)))
