"""`adalora export` and `adalora merge`: a trained adapter in the form that others read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError
from .console import Model, Settings, Source, open_console, refuse_existing

if TYPE_CHECKING:
    from ..quantized import Into
    from .runs import Trained

EXPORT_EPILOG = "Example: adalora export runs/mine --format lora-padded --out served"
MERGE_EPILOG = "Example: adalora merge runs/mine --out whole-model"


class Format(StrEnum):
    """What `export` writes."""

    lora = "lora"
    lora_padded = "lora-padded"
    merged = "merged"
    peft_adalora = "peft-adalora"


Out = Annotated[Path, typer.Option(help="A new folder.")]
QuantizedWeights = Annotated[
    Literal["dequantize", "requantize"] | None,
    typer.Option(
        "--quantized",
        help="Merged weights of a quantized base: floating point, or its few bits again; either states its error.",
    ),
]


def export(
    folder: Source,
    out: Out,
    format: Annotated[
        Format,
        typer.Option(
            help="lora: each matrix its own rank; lora-padded: one rank for all, for servers that know one only; "
            "merged: the whole model; peft-adalora: as PEFT's AdaLoRA stores it."
        ),
    ] = Format.lora,
    quantized: QuantizedWeights = None,
    model: Model = None,
    settings: Settings = None,
) -> None:
    """Write a trained adapter as plain LoRA, as a whole model, or as PEFT's AdaLoRA; read back and compared."""
    refuse_existing(out, "--out")
    from ..screen import quiet
    from .runs import read_trained

    quiet()
    trained = read_trained(folder, model, settings or ())
    task = trained.task()
    adapted: Any = trained.model(task).cpu()
    difference = _write(trained, adapted, Format(format), out, task.task_type, quantized)
    task.processor.save_pretrained(out)
    if not (out / "config.json").is_file():
        adapted.config.save_pretrained(out)  # knows the classes by name
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    checked = "" if difference is None else f"; read back, differs by at most {difference:.1e} of the largest increment"
    open_console().print(f"{Format(format).value} in {out}, {size:,} bytes{checked}", markup=False)


def merge(
    folder: Source, out: Out, quantized: QuantizedWeights = None, model: Model = None, settings: Settings = None
) -> None:
    """Write the base model with the adapter added to its weights: a model like any other."""
    export(folder, out, Format.merged, quantized, model, settings)


def _write(
    trained: Trained, model: Any, format: Format, out: Path, task_type: str | None, quantized: Into | None
) -> float | None:
    """Returns the largest relative difference read back; None where PEFT writes."""
    from ..checkpoint import save_adapter
    from ..export import export_lora
    from ..tasks.foreign import silenced
    from ..whole import export_merged

    name = trained.recipe.method["name"]
    if name in ("full", "bitfit", "houlsby", "pfeiffer"):
        raise ConfigError(f"{str(trained.adapter)!r} was trained by {name}, which is no low-rank increment to export.")
    if name not in ("adalora", "svd-lora", "peft-adalora"):
        if format is not Format.merged:
            raise ConfigError(f"{str(trained.adapter)!r} is a LoRA already; --format merged can be made of it.")
        if trained.recipe.model.quantization_config is not None:
            raise ConfigError(
                f"{str(trained.adapter)!r} is a LoRA on quantized weights, into which PEFT merges without a word "
                "on the rounding. Merge into the weights as they were before: --set model.quantization_config=null."
            )
        model.merge_and_unload().save_pretrained(out)
        return None
    match format:
        case Format.merged:
            if quantized:
                _state_error(model, quantized)
            with silenced("adalora"):
                return export_merged(model, out, quantized=quantized)
        case Format.peft_adalora:
            return save_adapter(model, out, base_model_name_or_path=trained.base, task_type=task_type)
    padded = format is Format.lora_padded
    return export_lora(model, out, padded=padded, base_model_name_or_path=trained.base, task_type=task_type)


def _state_error(model: Any, quantized: Into) -> None:
    from ..merging import merge, unmerge
    from ..tasks.foreign import silenced

    with silenced("adalora"):
        error = merge(model, quantized=quantized)
    unmerge(model)
    if error is not None:
        open_console().print(f"{quantized}: {error}", markup=False)
