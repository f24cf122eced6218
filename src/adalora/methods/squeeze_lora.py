"""Wide LoRA, squeezed to a budget on the way: a control for what over-parameterization alone is worth."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import TrainerCallback

from ..errors import ConfigError
from .base import ParameterCount
from .cutting import cut_, lora_pairs
from .lora import Lora, chosen, lora_count, wrap
from .options import CHOICE, check_counts, check_lora, check_parameters, is_number
from .settling import Settling
from .squeezing import squeezed


class SqueezeLora(Lora):
    """LoRA of rank init_r; once, its B·A are taken apart by SVD and the least singular directions of all are cut.

    Options: init_r, target_r (size in the end: that of a uniform LoRA of this rank) or parameters, `at` (fraction of
    the run after which it is squeezed), `by`: "density" ranks directions by σ² / (in + out), "plain" by σ²;
    lora_alpha, lora_dropout, and which modules. The scale is lora_alpha / init_r for life. What is kept of each
    matrix is its best approximation of that rank (Eckart and Young), shared evenly between A and B. The optimizer
    starts afresh for the new factors: its moments belong to entries in the old basis.
    """

    name: ClassVar[str] = "squeeze-lora"
    defaults: ClassVar[dict[str, Any]] = {
        "init_r": 16,
        "target_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        **CHOICE,
        "parameters": None,
        "at": 0.5,
        "by": "density",
    }
    resumable = False

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap in a PeftModel with rank init_r everywhere."""
        given = self._options
        config, costs = chosen(model, given)
        goal, whole = given["parameters"], sum(costs.values())
        self._budget = given["target_r"] * whole if goal is None else goal
        if not min(costs.values()) <= self._budget <= given["init_r"] * whole:
            raise ConfigError(
                f"parameters={goal} does not lie between one rank of one matrix, {min(costs.values())}, and the "
                f"{given['init_r'] * whole} that init_r={given['init_r']} starts with; change it, or init_r."
            )
        scale = given["lora_alpha"] / given["init_r"]
        wrapped = wrap(model, config, dict.fromkeys(costs, given["init_r"]), scale, given["lora_dropout"])
        lora_pairs(wrapped)  # raises for what cannot be cut
        self._peak = lora_count(wrapped)[0]
        return wrapped

    def callbacks(self) -> list[TrainerCallback]:
        """The one that squeezes."""
        return [Squeezer(self._budget, self._options["at"], self._options["by"] == "density")]

    def count(self, model: nn.Module) -> ParameterCount:
        """`peak` before anything was cut."""
        adapter, head = lora_count(model)
        return ParameterCount(self._peak, adapter, head)

    def _check(self) -> None:
        given = self._options
        check_counts(given, "init_r", "target_r")
        check_lora(given)
        check_parameters(given, "target_r")
        if given["parameters"] is None and given["target_r"] > given["init_r"]:
            raise ConfigError(f"target_r ({given['target_r']}) is above init_r ({given['init_r']}); raise init_r.")
        if not (is_number(given["at"]) and 0 < given["at"] < 1):
            raise ConfigError(f"at is {given['at']!r}; give a fraction of the run, above 0 and below 1.")
        if given["by"] not in ("density", "plain"):
            raise ConfigError(f"by is {given['by']!r}; choose density or plain.")


class Squeezer(Settling):
    """Squeezes a PeftModel to `budget` parameters when the fraction `at` of the run is over, or with its early end."""

    def __init__(self, budget: int, at: float, density: bool) -> None:
        super().__init__(SqueezeLora.name)
        self.budget, self.at, self.density = budget, at, density
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the step behind which it is due."""
        self.due = max(round(self.at * state.max_steps), 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Squeeze, if it is time."""
        if not self.done and state.global_step + 1 >= self.due:
            self._squeeze(kwargs["model"], kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Squeeze a run that ended before."""
        if not self.done:
            self._squeeze(kwargs["model"], kwargs["optimizer"])

    def _squeeze(self, model: Any, optimizer: Any) -> None:
        pairs = lora_pairs(model)
        costs = {name: pair.cost for name, pair in pairs.items()}
        factors = {name: (pair.A.detach(), pair.B.detach()) for name, pair in pairs.items()}
        cut_(model, squeezed(factors, costs, self.budget, self.density), optimizer)
        self.done = True
