"""Plain LoRA by PEFT, the baseline: uniform rank on the modules that AdaLoRA would adapt."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..checkpoint import exact_targets
from ..config import AdaLoraConfig
from ..conversion import adapter_type
from ..errors import AdapterFileError, ConfigError
from ..jsonfiles import believed, read_object
from ..quantizedmodels import prepare
from ..reading import CONFIG_FILE, WEIGHTS_FILE
from ..targets import find_targets
from .base import ParameterCount
from .options import CHOICE, check_counts, check_lora, check_parameters, resolved, with_head
from .ranks import spread
from .trained import check_read, undone


class Lora:
    """LoRA (arXiv 2106.09685). Options: r, lora_alpha, lora_dropout, target_modules, exclude_modules,
    modules_to_save, parameters.

    `parameters` fixes the size instead of r: the largest uniform rank that it allows, and what is left over
    as one more rank for single modules, spread over the depth. The scale stays lora_alpha / r for all.
    Raises ConfigError for an option that does not exist or cannot be meant.
    """

    name: ClassVar[str] = "lora"
    defaults: ClassVar[dict[str, Any]] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, **CHOICE, "parameters": None}
    resumable = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = resolved(self.name, self.defaults, options)
        self._check()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap in a PeftModel."""
        prepare(model)  # PEFT leaves quantized layers as they come
        config, costs = chosen(model, self._options)
        ranks = self._ranks(costs)
        scale = self._options["lora_alpha"] / self._options["r"]
        return wrap(model, config, ranks, scale, self._options["lora_dropout"])

    def callbacks(self) -> list[TrainerCallback]:
        """None: LoRA does nothing while training."""
        return []

    def added(self, model: nn.Module) -> list[nn.Parameter]:
        """A and B."""
        return list(lora_parameters(model).values())

    def count(self, model: nn.Module) -> ParameterCount:
        """LoRA's size never changes."""
        adapter, head = lora_count(model)
        return ParameterCount(adapter, adapter, head)

    def save(self, model: nn.Module, folder: Path, base: str, task_type: str | None) -> None:
        """As PEFT does."""
        model.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """For inference, on a quantized base by the kernels that it was trained with.

        Raises AdapterFileError, with `base` as it was.
        """
        prepare(base)
        return read_lora(base, folder)

    def options(self) -> dict[str, Any]:
        """All options, defaults resolved."""
        return dict(self._options)

    def _check(self) -> None:
        check_counts(self._options, "r")
        check_lora(self._options)
        check_parameters(self._options, "r")

    def _ranks(self, costs: Mapping[str, int]) -> dict[str, int]:
        goal, whole = self._options["parameters"], sum(costs.values())
        if goal is None:
            return dict.fromkeys(costs, self._options["r"])
        if goal < whole:
            raise ConfigError(f"parameters={goal} is below what rank 1 everywhere needs, {whole}.")
        return spread(costs, goal)


def chosen(model: nn.Module, options: Mapping[str, Any]) -> tuple[AdaLoraConfig, dict[str, int]]:
    """What CHOICE in `options` means for `model`, the task head included, and the cost in + out of each matrix."""
    config = with_head(model, AdaLoraConfig(**{key: options[key] for key in CHOICE}))
    return config, {name: sum(shape_of(module)) for name, module in find_targets(model, config).items()}


def wrap(model: nn.Module, config: AdaLoraConfig, ranks: Mapping[str, int], scale: float, dropout: float) -> PeftModel:
    """A PeftModel with a LoRA of these ranks and one scale; matrices of rank 0 are left alone.

    Raises ConfigError if no matrix has a rank.
    """
    ranks = {name: rank for name, rank in ranks.items() if rank}
    if not ranks:
        raise ConfigError("no matrix would get a rank of at least 1; raise the size.")
    lora = LoraConfig(
        lora_dropout=dropout,
        target_modules=exact_targets(model, ranks),
        modules_to_save=list(config.modules_to_save or ()) or None,
        **rank_fields(ranks, scale),
    )
    return get_peft_model(model, lora)


def rank_fields(ranks: Mapping[str, int], scale: float) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that give each matrix its rank, and all of them one scale."""
    least = min(ranks.values())
    more = {f"^{name}": rank for name, rank in ranks.items() if rank != least}
    return {
        "r": least,
        "lora_alpha": scale * least,
        "rank_pattern": more,
        "alpha_pattern": {name: scale * rank for name, rank in more.items()},
    }


def read_lora(base: nn.Module, folder: Path) -> PeftModel:
    """`base` with the LoRA that PEFT stored in `folder`, for inference.

    Raises AdapterFileError if it is missing, damaged, of another model or no safetensors, with `base` as it was.
    """
    tensors = _checked(folder)
    with undone(base), believed(folder, SafetensorError, RuntimeError, OSError, re.error, NotImplementedError):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            model = PeftModel.from_pretrained(base, str(folder))
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        differ = [key for key in wanted if key not in tensors or tensors[key].shape != wanted[key].shape]
        differ += [key for key in tensors.keys() - wanted.keys() if ".lora_" in key]
        if differ:
            raise AdapterFileError(
                f"the LoRA in {str(folder)!r} is not the one that {CONFIG_FILE} tells: {min(differ)!r} is in one of "
                "both only. Restore it from a copy, or give the model that it was made for."
            )
    return model


def _checked(folder: Path) -> dict[str, Tensor]:
    """The tensors in `folder`; PEFT would read a pickle instead of them, or ask the hub for a folder without any."""
    config, file = read_object(folder / CONFIG_FILE), folder / WEIGHTS_FILE
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{str(folder)!r} says peft_type={config.get('peft_type')!r}, not 'LORA'; load it by its own method."
        )
    if config.get("megatron_config") is not None:  # for which PEFT imports whatever module `megatron_core` names
        raise AdapterFileError(f"{str(folder)!r} has a megatron_config, which names code to import; take that out.")
    if not file.is_file():
        hint = " Pickle files (.bin) are never read; load it in PEFT and save it again as safetensors."
        raise AdapterFileError(
            f"{str(folder)!r} has no {WEIGHTS_FILE}; restore it from a copy."
            + (hint if file.with_suffix(".bin").exists() else "")
        )
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"cannot read {str(file)!r}: {error}. Restore it from a copy.") from error
    check_read(tensors, file)
    # A is (r, …): a rank that no tensor has, PEFT would allocate all the same.
    ranked = [value for key, value in tensors.items() if re.search(r"\.lora_(embedding_)?A", key) and value.numel()]
    most = max((len(value) for value in ranked if value.dim()), default=0)
    with believed(folder):
        for rank in (config["r"], *(config.get("rank_pattern") or {}).values()):
            if not 0 < rank <= most:
                raise AdapterFileError(
                    f"{str(folder / CONFIG_FILE)!r} tells of a rank {rank!r}, {WEIGHTS_FILE} holds none above {most}"
                    "; restore both from one save."
                )
    return tensors


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains of the adapter of a PeftModel, by name."""
    return {name: parameter for name, parameter in _trained(model).items() if ".lora_" in name}


def lora_count(model: nn.Module) -> tuple[int, int]:
    """Trained parameters of a PeftModel: of its adapter, and of its head."""
    adapter = sum(parameter.numel() for parameter in lora_parameters(model).values())
    return adapter, sum(parameter.numel() for parameter in _trained(model).values()) - adapter


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    # Of a model without weights, PEFT has AdaLoRA's ranknum train as well.
    return {name: p for name, p in model.named_parameters() if p.requires_grad and ".ranknum." not in name}


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of the increment on a module that `find_targets` found."""
    kind = adapter_type(type(module))
    assert kind is not None
    return kind.shape_of(module)
