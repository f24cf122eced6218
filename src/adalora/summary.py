"""What is printed when a run is over."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from .result import RunResult


def print_result(result: RunResult, console: Console) -> None:
    """Scores, parameters, time, the heat map of ranks, and where everything is."""
    scores = "  ".join(f"{name} {value:.4f}" for name, value in result.scores.items())
    console.print(f"  {scores}", style="bold")
    count = result.count
    console.print(
        f"  {count.final:,} adapter parameters (peak {count.peak:,}), {count.head:,} in the head, "
        f"{result.steps} steps in {result.seconds:.0f} s",
    )
    print_heatmap(result, console)
    console.print(f"  everything is in {result.folder}")


def print_heatmap(result: RunResult, console: Console) -> None:
    """The ranks of an AdaLoRA run; in colour where the terminal has it."""
    if result.report is not None:
        console.print(Text.from_ansi(result.report.heatmap(color=console.is_terminal)))
