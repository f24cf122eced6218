"""Plain LoRA by PEFT, the baseline: uniform rank on the modules that AdaLoRA would adapt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from ..checkpoint import exact_targets
from ..config import AdaLoraConfig
from ..conversion import adapter_type
from ..errors import ConfigError
from ..quantizedmodels import prepare
from ..targets import find_targets
from .base import ParameterCount
from .options import CHOICE, check_counts, check_lora, check_parameters, resolved, with_head
from .ranks import spread


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
        """For inference, on a quantized base by the kernels that it was trained with."""
        prepare(base)
        return PeftModel.from_pretrained(base, str(folder))

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
