"""`adalora squeeze`: any PEFT LoRA folder, cut to a budget without data and without its model."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AdapterFileError, ConfigError
from .console import open_console, refuse_existing

if TYPE_CHECKING:
    from torch import Tensor

SQUEEZE_EPILOG = "Example: adalora squeeze runs/lora --target-r 2 --out small"
_FACTOR = re.compile(r"(?P<name>.+)\.lora_(?P<part>A|B)\.weight")
# Increments that are more than scale · B A, or that belong to another base model than the one that is named.
_OTHERS = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication", "target_parameters")
_LARGEST = 1e15  # of a norm or a scale: squares and products stay far from where float32 ends
_OWN_BASE = ("gaussian", "eva", "orthogonal")  # starts by name that leave the base model as it is


@dataclass(frozen=True)
class _Lora:
    """A folder as read: its configuration, (A (r, in), B (out, r), scale) by module, and all other tensors."""

    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor, float]]
    others: dict[str, Tensor]

    @property
    def costs(self) -> dict[str, int]:
        """Parameters of one rank."""
        return {name: A.shape[1] + B.shape[0] for name, (A, B, _) in self.factors.items()}

    @property
    def size(self) -> int:
        """Parameters of all factors."""
        return sum(A.numel() + B.numel() for A, B, _ in self.factors.values())


def squeeze(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A LoRA of PEFT's, or a run that made one.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    target_r: Annotated[
        int | None, typer.Option("--target-r", min=1, help="As large as a uniform LoRA of this rank.")
    ] = None,
    parameters: Annotated[int | None, typer.Option(min=1, help="Or no more than this many parameters.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Rank directions by σ² alone, not by σ² for what they cost.")
    ] = False,
) -> None:
    """Cut a LoRA to a budget: of all matrices, the singular directions that carry most stay, exactly as they are."""
    if (target_r is None) == (parameters is None):
        raise ConfigError("give the size that is wanted, as --target-r R or as --parameters N.")
    refuse_existing(out, "--out")
    from .runs import adapter_folder

    source = adapter_folder(folder)
    lora = read_lora(source)
    budget = parameters or (target_r or 0) * sum(lora.costs.values())
    if not min(lora.costs.values()) <= budget <= lora.size:
        raise ConfigError(
            f"a budget of {budget:,} parameters does not lie between one rank of one matrix, "
            f"{min(lora.costs.values()):,}, and the {lora.size:,} that {str(source)!r} has."
        )
    small, kept = cut(lora, budget, not plain)
    _write(small, source, out)
    ranks = [len(A) for A, _, _ in small.factors.values()]
    open_console().print(
        f"{out}: {lora.size:,} → {small.size:,} parameters, {sum(ranks)} ranks in {len(ranks)} of {len(lora.factors)} "
        f"matrices, {kept:.2%} of the increments' squared norm",
        markup=False,
    )


def cut(lora: _Lora, budget: int, density: bool) -> tuple[_Lora, float]:
    """The LoRA with at most `budget` parameters, and the share of Σ‖ΔW‖² that it keeps."""
    from ..methods.squeezing import squeezed

    whole = {name: (A, B * scale) for name, (A, B, scale) in lora.factors.items()}
    factors = {}
    for name, (A, B) in squeezed(whole, lora.costs, budget, density).items():
        scale = lora.factors[name][2]
        if len(A):  # shared evenly between A and B, so that both train alike
            factors[name] = (A / math.sqrt(scale), B / math.sqrt(scale), scale)
    before = sum(_energy(A, B) for A, B in whole.values())
    after = sum(_energy(A, B * scale) for A, B, scale in factors.values())
    return _Lora(lora.config, factors, lora.others), after / before if before else 1.0


def read_lora(folder: Path) -> _Lora:
    """A LoRA folder as PEFT writes it. Raises AdapterFileError for one that is not, or that is more than B A."""
    from ..jsonfiles import believed

    with believed(folder, re.error):
        return _read(folder)


def _read(folder: Path) -> _Lora:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..jsonfiles import read_object
    from ..reading import CONFIG_FILE, PREFIX, WEIGHTS_FILE

    config = read_object(folder / CONFIG_FILE)
    _check_kind(config, folder)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"cannot read {str(folder / WEIGHTS_FILE)!r}: {error}. If PEFT stored it as adapter_model.bin, load it and "
            "save it again."
        ) from error
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in tensors.items():
        found = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if found and value.dim() == 2:
            parts.setdefault(found["name"], {})[found["part"]] = value.float()
        elif ".lora_" in key:
            raise AdapterFileError(f"{str(folder)!r}: {key!r} belongs to no linear layer, and only those can be cut.")
        else:
            others[key] = value
    if not parts or any(set(pair) != {"A", "B"} for pair in parts.values()):
        raise AdapterFileError(f"{str(folder)!r} does not hold an A and a B for each matrix; restore it from a copy.")
    factors = {name: (pair["A"], pair["B"], _scale(config, name, len(pair["A"]))) for name, pair in parts.items()}
    for name, (A, B, scale) in factors.items():
        _check_factors(A, B, scale, f"{str(folder)!r}: {name!r}")
    return _Lora(config, factors, others)


def _check_factors(A: Tensor, B: Tensor, scale: float, where: str) -> None:
    """Raise AdapterFileError unless A (r, in) and B (out, r) have a product whose square is a float32."""
    if not 0 < len(A) == B.shape[1]:
        raise AdapterFileError(
            f"{where} has an A of shape {tuple(A.shape)} and a B of {tuple(B.shape)}, which have no product of a rank "
            "of at least 1; restore it from a copy."
        )
    size = float(A.norm()) * float(B.norm())
    if not (size < _LARGEST and 1 / _LARGEST < scale < _LARGEST and size * scale < _LARGEST):
        raise AdapterFileError(
            f"{where} has factors of norm {float(A.norm()):.2g} and {float(B.norm()):.2g} at the scale {scale:.2g}, "
            "which no training leaves: it has diverged, or the file is damaged. Restore it from a copy."
        )


def _check_kind(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{str(folder)!r} is a {config.get('peft_type')!r} adapter, and squeeze takes LoRA. An AdaLoRA becomes one "
            f"by: adalora export {folder} --format lora --out FOLDER"
        )
    start = config.get("init_lora_weights")
    set_ = [key for key in _OTHERS if config.get(key)]
    if config.get("bias", "none") != "none":
        set_.append(f"bias={config['bias']!r}")
    if isinstance(start, str) and start not in _OWN_BASE:
        set_.append(f"init_lora_weights={start!r}")
    if set_:
        raise AdapterFileError(
            f"{str(folder)!r} has {', '.join(set_)}: its increments are more than B·A, or on a changed base model. "
            "Squeeze a plain LoRA."
        )


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies B A by; a key of alpha_pattern is a regular expression for the end of a name."""
    patterns = config.get("alpha_pattern") or {}
    own = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = float(next(own, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _write(lora: _Lora, source: Path, out: Path) -> None:
    from safetensors.torch import save_file

    from ..files import staged
    from ..reading import CONFIG_FILE, PREFIX, WEIGHTS_FILE

    ranks = {name: len(A) for name, (A, _, _) in lora.factors.items()}
    alphas = {name: scale * ranks[name] for name, (_, _, scale) in lora.factors.items()}
    first = next(iter(ranks))
    config = lora.config | {
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "use_rslora": False,
        # Those that are left, whole names: a matrix without a rank is not adapted any more.
        "target_modules": "|".join(map(re.escape, ranks)),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    tensors = dict(lora.others)
    for name, (A, B, _) in lora.factors.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A.contiguous(), f"{PREFIX}{name}.lora_B.weight": B.contiguous()}
    with staged(out) as staging:
        for file in source.iterdir():
            if file.is_file() and file.name not in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(file, staging / file.name)
        save_file(tensors, staging / WEIGHTS_FILE, {"format": "pt"})
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _energy(A: Tensor, B: Tensor) -> float:
    """‖B A‖², without the product."""
    return float(((A @ A.T) * (B.T @ B)).sum())
