"""A plan as text: one of a run, or a table over final ranks."""

from __future__ import annotations

from typing import Any

import typer

from .console import open_console, print_table


def print_sweep(rows: list[dict[str, Any]]) -> None:
    """A line for each rank."""
    columns = ("target_r", "init_r", "triplets", "parameters", "at the start", "head", "file", "training")
    lines = []
    for row in rows:
        numbers = ("–" if row[key] is None else f"{row[key]:,}" for key in ("triplets", "final", "peak", "head"))
        sizes = (_bytes(row[key]) for key in ("file_bytes", "training_bytes"))
        lines.append((str(row["target_r"]), str(row["init_r"]), *numbers, *sizes))
    print_table(columns, lines, left=0)
    typer.echo("parameters: of the adapter, if spread evenly; training: memory of all that trains, no activations")


def print_plan(facts: dict[str, Any]) -> None:
    """What `plan_facts` found."""
    lines = [f"model      {facts['model']} for {facts['task']}, {facts['method']}"]
    numbers = facts["parameters"]
    if "matrices" in facts:
        triplets = facts["triplets"]
        lines += [
            f"matrices   {facts['matrices']}; one rank on all of them is {numbers['unit']:,} parameters in A and B",
            f"triplets   {triplets['initial']:,} at the start, "
            + (f"{triplets['target']:,} in the end" if triplets["target"] is not None else "as many as fit in the end"),
            f"parameters {numbers['peak']:,} at the start, {numbers['final']:,} in the end"
            + (" if spread evenly" if triplets["target"] is not None else " at most")
            + f" ({numbers['least']:,} to {numbers['most']:,}), {numbers['head']:,} in the head",
        ]
    else:
        lines += [f"parameters {numbers['final']:,} in adapters, {numbers['head']:,} in the head"]
    lines += [f"file       {facts['file_bytes']:,} bytes ({_bytes(facts['file_bytes'])})", *_memory_lines(facts)]
    lines += [f"start      {facts['start']}"] if facts.get("start") else []
    lines += [*_schedule_lines(facts), *_time_lines(facts)]
    console = open_console()
    for line in lines:
        console.print(line, markup=False)


def _memory_lines(facts: dict[str, Any]) -> list[str]:
    parts, batch = facts["memory"], facts["batch"]
    how = "activations counted in a pass without values" if "activations" in parts else "without activations"
    lines = [f"memory     {_bytes(sum(parts.values()))} for a batch of {batch['rows']} × {batch['longest']}, {how}:"]
    return lines + [f"             {name:<20} {_bytes(size):>9}" for name, size in parts.items()]


def _schedule_lines(facts: dict[str, Any]) -> list[str]:
    if "phases" not in facts:
        return []
    schedule = facts["schedule"]
    if schedule is None:
        phases = ", ".join(f"{name} {value}" for name, value in facts["phases"].items())
        return [f"schedule   {phases}; the length of the data is unknown, give --steps for the rest"]
    budget = ", ".join(f"{count:,} at {step:,}" for step, count in schedule["budget"].items())
    return [
        f"schedule   {facts['steps']:,} steps: {schedule['tinit']:,} warm-up, {schedule['reduction']:,} reduction, "
        f"{schedule['tfinal']:,} final; {schedule['allocations']:,} allocations, every {schedule['deltaT']:,}",
        f"budget     {budget} {facts['unit']}",
    ]


def _time_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"unknown    {facts['unknown']}"] if "unknown" in facts else []
    if "seconds_per_step" in facts:
        each, steps = facts["seconds_per_step"], facts["steps"]
        whole = f", {_duration(each * steps)} for {steps:,} steps" if steps else ""
        least = "" if facts["time_source"].startswith("measured") else "at least "
        lines.append(f"time       {least}{each:.3g} s a step{whole}: {facts['time_source']}")
    return lines


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 1000 else f"{size / 1000:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
