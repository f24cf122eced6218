"""AdaLoRA by PEFT, as it comes or tuned, in a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig as PeftConfig
from peft import PeftModel
from peft.tuners.adalora import RankAllocator
from torch import nn
from transformers import TrainerCallback

from ..allocation import keep_top
from ..checkpoint import exact_targets, load_adapter
from ..config import AdaLoraConfig
from ..errors import ConfigError
from ..importance import triplet_scores
from ..quantizedmodels import prepare
from ..schedule import Schedule
from .base import ParameterCount
from .lora import chosen, lora_count, lora_parameters
from .options import CHOICE, check_parameters, resolved
from .settling import Settling

_NAME, _ADAPTER = "peft-adalora", "default"
_DEFAULTS: dict[str, Any] = {  # PEFT's own
    "init_r": 12,
    "target_r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    **CHOICE,
    "parameters": None,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
}
_SHARED = [name for name in _DEFAULTS if name != "parameters"]


class PeftAdaLora:
    """PEFT's AdaLoRA with its defaults. Options: as in AdaLoraConfig, phases in steps or fractions; parameters.

    With `parameters` instead of target_r, budgets count parameters, triplets at in + out + 1: the same scores and
    schedule, but the first that fit are kept. That is ours; everything else runs in PEFT. Its scale is
    lora_alpha / init_r.
    """

    resumable = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = given = resolved(_NAME, _DEFAULTS, options)
        check_parameters(given, "target_r")
        fixed = {"target_r": 1} if given["parameters"] is not None else {}
        self._config = AdaLoraConfig(**({name: given[name] for name in _SHARED} | fixed))  # it checks them
        if given["parameters"] is None and not 1 <= given["target_r"] < given["init_r"]:
            raise ConfigError(
                f"target_r is {given['target_r']}, init_r {given['init_r']}; PEFT's allocator needs 1 ≤ target_r < "
                "init_r. For a rank that does not change use method svd-lora."
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap in a PeftModel. The schedule is set when the Trainer knows its steps."""
        prepare(model)  # PEFT leaves quantized layers as they come
        given = self._options
        config, costs = chosen(model, given)
        whole, goal = sum(given["init_r"] * (cost + 1) for cost in costs.values()), given["parameters"]
        if goal is not None and not min(costs.values()) < goal < whole:
            raise ConfigError(
                f"parameters={goal} does not lie between one triplet, {min(costs.values()) + 1}, and the {whole} that "
                f"init_r={given['init_r']} starts with; change it, or init_r."
            )
        fields = ("init_r", "lora_alpha", "lora_dropout", "beta1", "beta2", "orth_reg_weight")
        theirs = PeftConfig(
            target_modules=exact_targets(model, costs),
            modules_to_save=list(config.modules_to_save or ()) or None,
            target_r=self._config.target_r,
            total_step=1,
            **{name: given[name] for name in fields},
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # it then does what is right
            wrapped = ThroughTheTuner(model, theirs)
        if goal is not None:
            tuner = wrapped.base_model
            tuner.rankallocator = ByParameters(tuner.model, theirs, _ADAPTER, goal)
        self._peak = lora_count(wrapped)[0]
        return wrapped

    def callbacks(self) -> list[TrainerCallback]:
        """The one that calls PEFT's allocator."""
        return [UpdateAndAllocate(self._config)]

    def added(self, model: nn.Module) -> list[nn.Parameter]:
        """A, E and B."""
        return list(lora_parameters(model).values())

    def count(self, model: nn.Module) -> ParameterCount:
        """`final` counts live triplets: A, B and Λ of each."""
        final, head = sum(rank * cost for rank, cost in _live(model)), lora_count(model)[1]
        return ParameterCount(self._peak, final, head)

    def save(self, model: nn.Module, folder: Path, base: str, task_type: str | None) -> None:
        """As PEFT does."""
        model.peft_config[_ADAPTER].base_model_name_or_path = base  # type: ignore[union-attr,index]
        model.peft_config[_ADAPTER].task_type = task_type  # type: ignore[union-attr,index]
        model.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """For inference, by this package, which reads PEFT's AdaLoRA."""
        return load_adapter(base, folder)

    def options(self) -> dict[str, Any]:
        """All options, defaults resolved."""
        return dict(self._options)


class ThroughTheTuner(PeftModel):
    """A PeftModel without a task type goes past its tuner, whose forward adds the regularizer; this one does not.

    With a task type it would go through it, but choose the head by itself.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's output, whose loss has the regularizer."""
        return self.base_model(*args, **kwargs)


class ByParameters(RankAllocator):
    """PEFT's allocator with budgets in parameters."""

    def __init__(self, model: nn.Module, config: Any, adapter: str, goal: int) -> None:
        self._goal = goal
        super().__init__(model, config, adapter)

    def _set_budget_scheduler(self, model: nn.Module) -> None:
        super()._set_budget_scheduler(model)
        self.init_bgt, self.target_bgt = sum(r * cost for _, (r, cost) in _matrices(model)), self._goal

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Zero Λ of what is not kept; returns the pattern, {name of Λ: kept}."""
        names = [name for name, _ in _matrices(model)]
        parts = [[self._element_score(name % f"lora_{part}") for part in "AEB"] for name in names]
        scores = [triplet_scores(*part) for part in parts]
        keeps = keep_top(scores, budget, costs=[cost for _, (_, cost) in _matrices(model)])
        pattern = {name % "lora_E": keep for name, keep in zip(names, keeps, strict=True)}
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, keep in pattern.items():
                parameters[name].masked_fill_(~keep.to(parameters[name].device).unsqueeze(1), 0.0)
        return {name: keep.tolist() for name, keep in pattern.items()}


class UpdateAndAllocate(Settling):
    """Calls update_and_allocate behind each optimizer step, before the gradients are dropped, as PEFT asks."""

    def __init__(self, config: AdaLoraConfig) -> None:
        super().__init__(_NAME)
        self.config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell PEFT the schedule in steps."""
        tuner = kwargs["model"].base_model
        schedule = Schedule.from_config(
            self.config, tuner.rankallocator.init_bgt, tuner.rankallocator.target_bgt, state.max_steps
        )
        for field in ("tinit", "tfinal", "deltaT", "total_step"):
            setattr(tuner.peft_config[_ADAPTER], field, getattr(schedule, field))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count steps from 0, as PEFT does."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Meet the budget, whatever the last allocation was: PEFT stores its pattern, not what grew since."""
        tuner = kwargs["model"].base_model
        config, allocator = tuner.peft_config[_ADAPTER], tuner.rankallocator
        if allocator.exp_avg_ipt:  # the pattern is not final
            config.rank_pattern = allocator.mask_to_budget(tuner.model, allocator.target_bgt)
        allocator.mask_using_rank_pattern(tuner.model, config.rank_pattern)


def _matrices(model: nn.Module) -> list[tuple[str, tuple[int, int]]]:
    """(name with %s for its factor, (rank, parameters of a triplet)) of each adapted matrix below the tuner."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = [name.replace("lora_A", "%s") for name in shapes if name.endswith(f"lora_A.{_ADAPTER}")]
    sizes = {name: (shapes[name % "lora_A"], shapes[name % "lora_B"]) for name in found}
    return [(name, (A[0], A[1] + B[0] + 1)) for name, (A, B) in sizes.items()]


def _live(model: Any) -> list[tuple[int, int]]:
    """(live triplets, parameters of each) of each matrix; all are live before the first allocation."""
    pattern = model.peft_config[_ADAPTER].rank_pattern or {}
    pattern = {name.removesuffix(f".{_ADAPTER}"): keep for name, keep in pattern.items()}
    ranks = []
    for name, (rank, cost) in _matrices(model.base_model.model):
        keep = pattern.get(name.removesuffix(f".{_ADAPTER}") % "lora_E")
        ranks.append((rank if keep is None else sum(keep), cost))
    return ranks
