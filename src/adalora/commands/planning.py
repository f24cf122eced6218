"""`adalora plan`: what a run will cost and when its budget falls, without training and without weights."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError
from .console import AsJson, Settings, complete_recipe, print_json
from .planned import print_plan, print_sweep
from .ranks import read_ranks, require_no_blanks, with_rank

if TYPE_CHECKING:
    from ..config import AdaLoraConfig
    from ..recipe import Recipe
    from .sizes import Sizes

PLAN_EPILOG = (
    "Examples: adalora plan text-classification --set data.train=train.jsonl · "
    "adalora plan microsoft/deberta-v3-base --target-r 1,2,4,8 --steps 10000"
)
_SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the reduction phase: where the budget is printed


def _take_the_rest(context: typer.Context, given: list[str] | None) -> list[str] | None:
    if given:  # behind a blank stand further ranks: the message is ours, not click's
        context.allow_extra_args = True
    return given


def plan(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL", help="A recipe, or a model's hub name or folder.", autocompletion=complete_recipe
        ),
    ],
    settings: Settings = None,
    target_r: Annotated[
        list[str] | None,
        typer.Option("--target-r", metavar="R,R,…", callback=_take_the_rest, help="Final ranks to compare in a table."),
    ] = None,
    task: Annotated[str, typer.Option(help="Task of a MODEL; a recipe has its own.")] = "classification",
    labels: Annotated[int, typer.Option(min=1, help="Classes of the head.")] = 2,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; else counted from recipe and data.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time a few real steps, on random weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell parameters, file size, memory, time and schedule of a run before it; no weights are loaded."""
    from ..screen import quiet

    quiet()
    require_no_blanks([source, *context.args], target_r)
    ranks = read_ranks(target_r)
    recipe = _recipe(source, settings or [], task)
    if len(ranks) > 1:
        rows = [_sweep_row(recipe, rank, labels) for rank in ranks]
        print_json(rows) if as_json else print_sweep(rows)
        return
    facts = plan_facts(with_rank(recipe, ranks[0]) if ranks else recipe, labels, steps, measure)
    print_json(facts) if as_json else print_plan(facts)


def plan_facts(recipe: Recipe, labels: int, steps: int | None, measure: bool) -> dict[str, Any]:
    """All numbers of a plan, JSON-able. Raises AdaLoraError for a recipe that cannot run."""
    from ..injection import adapter_config
    from ..integrations.models import is_adapted
    from ..integrations.starting import describe_start
    from ..methods import build_method
    from ..resolve import resolve_model
    from .skeleton import build, count_load, machine_flops, measure_step

    path, base = resolve_model(recipe)
    method = build_method(recipe.method)
    model = method.prepare(build(path, recipe, labels))
    training = _training(recipe)
    size, accumulated = training["per_device_train_batch_size"], training.get("gradient_accumulation_steps", 1)
    steps = steps or run_steps(recipe, training)
    facts: dict[str, Any] = {"model": base, "task": recipe.task, "method": recipe.method["name"], "steps": steps}
    facts |= _size_facts(model, method, recipe, steps)
    load = count_load(model, recipe, size)
    facts["batch"] = {"rows": size, "longest": _longest(model, recipe), "accumulated": accumulated}
    if is_adapted(model):
        facts["start"] = describe_start(adapter_config(model), size * accumulated)
    if isinstance(load, str):
        facts["unknown"] = f"activations and time: the model cannot run without its values ({load})"
    else:
        facts["memory"]["activations"] = load.activations
        facts["flops_per_step"] = load.flops * accumulated
        facts["seconds_per_step"] = load.flops * accumulated / machine_flops()
        facts["time_source"] = "at the speed of a matrix product on this machine, which training does not reach"
    if measure:
        facts["seconds_per_step"] = measure_step(path, recipe, build_method(recipe.method), labels, size) * accumulated
        facts["time_source"] = "measured here with random weights and full-length rows"
    return facts


def run_steps(recipe: Recipe, training: dict[str, Any]) -> int | None:
    """Optimizer steps on one device, as the Trainer counts them; None where the length of the data is unknown."""
    if (training.get("max_steps") or -1) > 0:
        return int(training["max_steps"])
    data = recipe.data
    rows = None if data.name else count_rows(Path(data.train))
    if rows is None:
        return None
    if data.validation is None:
        from ..tasks.data import HELD_OUT

        rows -= math.ceil(rows * HELD_OUT)
    rows = min(rows, data.train_rows or rows)
    batches = math.ceil(rows / training["per_device_train_batch_size"])
    per_epoch = max(math.ceil(batches / training.get("gradient_accumulation_steps", 1)), 1)
    return math.ceil(training["num_train_epochs"] * per_epoch)


def count_rows(file: Path) -> int | None:
    """Rows of a data file; None if it is not there or its format does not tell. Raises DataError."""
    if not file.is_file():
        return None
    try:
        return _count_rows(file)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:  # pyarrow's own are among them
        raise DataError(
            f"cannot count the rows of {str(file)!r}: {str(error)[:200]}. It is damaged, or no {file.suffix} file of "
            "UTF-8 text: restore it, or convert it."
        ) from error


def _count_rows(file: Path) -> int | None:
    if file.suffix == ".parquet":
        from pyarrow import parquet  # type: ignore[import-untyped]

        return int(parquet.ParquetFile(file).metadata.num_rows)
    kind = Path(file.name.removesuffix(".gz")).suffix
    if kind not in (".jsonl", ".csv", ".tsv"):
        return None
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        rows = csv.reader(lines) if kind == ".csv" else (line.strip() for line in lines)
        return max(sum(1 for row in rows if row) - (kind != ".jsonl"), 0)  # but the header


def schedule_facts(config: AdaLoraConfig, sizes: Sizes, steps: int) -> dict[str, Any]:
    """Phases in steps, how often triplets are chosen anew, and the budget along the way."""
    from ..schedule import Schedule

    schedule = Schedule.from_config(config, sizes.budget.initial, sizes.budget.target, steps)
    falling = schedule.freeze_step - schedule.tinit
    shown = sorted({min(schedule.tinit + round(part * falling), steps - 1) for part in _SHOWN})
    return {
        "tinit": schedule.tinit,
        "reduction": falling,
        "tfinal": steps - schedule.freeze_step,
        "deltaT": schedule.deltaT,
        "allocations": sum(schedule.allocates(step) for step in range(steps)),
        "budget": {step: schedule.budget(step) for step in shown},
    }


def _recipe(source: str, settings: list[str], task: str) -> Recipe:
    """The recipe, or one of defaults for a model."""
    from ..recipe import load_recipe, recipe_names
    from ..sections import DATA

    if source in recipe_names() or Path(source).is_file():
        return load_recipe(source, settings)
    if not Path(source).is_dir() and Path(source).suffix in (".yaml", ".yml"):
        raise ConfigError(f"{source!r} is not there; give a recipe, or a model's hub name or folder.")
    if task not in DATA:
        raise ConfigError(f"--task is {task!r}; known are {', '.join(DATA)}.")
    from .defaults import recipe_of

    given = {"task": task, "model": {"name_or_path": source}, "data": {}, "method": {"name": "adalora"}}
    return recipe_of(given, settings)


def _training(recipe: Recipe) -> dict[str, Any]:
    from ..resolve import resolve_without_data

    return resolve_without_data(recipe).training


def _size_facts(model: Any, method: Any, recipe: Recipe, steps: int | None) -> dict[str, Any]:
    """Sizes, memory and schedule of a prepared model, by method."""
    from ..importance import kept_numbers
    from ..injection import adapter_config, base_size
    from ..methods.adalora import AdaLora
    from ..tasks.quantization import frozen_bytes
    from .sizes import FP32, adapter_sizes, memory
    from .skeleton import shapes_of

    frozen = frozen_bytes(model, recipe)
    if not isinstance(method, AdaLora):
        count = method.count(model)
        numbers = {"peak": count.peak, "final": count.final, "head": count.head}
        size = FP32 * (count.final + count.head)
        return {"parameters": numbers, "file_bytes": size, "memory": memory(frozen, count.peak, count.head, 0)}
    config, (shapes, whole) = adapter_config(model), shapes_of(model)
    sizes = adapter_sizes(shapes, config, whole, base_size(model))
    numbers = {key: getattr(sizes, key) for key in ("peak", "final", "least", "most", "unit", "head")}
    return {
        "matrices": sizes.matrices,
        "triplets": {"initial": sizes.initial, "target": sizes.budget.target if config.budget == "triplets" else None},
        "unit": sizes.budget.unit,
        "parameters": numbers,
        "file_bytes": sizes.file_bytes,
        "memory": memory(frozen, sizes.peak, sizes.head, kept_numbers(config.importance, sizes.initial, sizes.peak)),
        "schedule": schedule_facts(config, sizes, steps) if steps else None,
        "phases": {"tinit": config.tinit, "tfinal": config.tfinal, "deltaT": config.deltaT},
    }


def _sweep_row(recipe: Recipe, rank: int, labels: int) -> dict[str, Any]:
    from ..methods import build_method
    from ..resolve import resolve_model
    from .skeleton import build

    recipe = with_rank(recipe, rank)
    method = build_method(recipe.method)
    facts = _size_facts(method.prepare(build(resolve_model(recipe)[0], recipe, labels)), method, recipe, None)
    trained = sum(size for name, size in facts["memory"].items() if name != "base weights")
    return {
        "target_r": rank,
        "init_r": recipe.method.get("init_r", recipe.method.get("r")),
        "triplets": facts.get("triplets", {}).get("target"),
        **{key: facts["parameters"][key] for key in ("peak", "final", "head")},
        "file_bytes": facts["file_bytes"],
        "training_bytes": trained,
    }


def _longest(model: Any, recipe: Recipe) -> str:
    from .skeleton import longest

    data: Any = recipe.data
    if recipe.task == "image-classification":
        return "one image"
    length, wanted = longest(model, recipe), getattr(data, "max_length", 0) or data.max_source_length
    most = "" if length == wanted else ", the model's most"
    return (
        f"({length} + {data.max_target_length}) tokens{most}" if recipe.task == "seq2seq" else f"{length} tokens{most}"
    )
