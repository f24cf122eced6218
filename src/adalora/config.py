"""AdaLoraConfig: every choice of the method, checked when it is made.

Field names are PEFT's wherever PEFT has the field, so that a configuration reads the same in both and goes
into the same file. A field that would do nothing does not exist here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .checks import check_int, check_pattern, check_real
from .errors import ConfigError
from .presets import resolved
from .schedule import Schedule

Bias = Literal["none", "all", "lora_only"]
OrthForm = Literal["norm", "squared"]
Importance = Literal["sensitivity*uncertainty", "sensitivity", "magnitude", "fisher"]
Unit = Literal["triplets", "params"]
Start = Literal["gaussian", "lora", "orthogonal", "gradient", "activation"]

_CHOICES = {
    "bias": Bias,
    "budget": Unit,
    "init_lora_weights": Start,
    "importance": Importance,
    "orth_reg_form": OrthForm,
}

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """What to adapt, how large, and on which schedule.

    Which modules
        target_modules: list of module names or dotted endings of them, a regular expression that matches the
            whole name, or "all-linear": every linear layer but the output head.
        exclude_modules: list or regular expression; these are left alone.
        layers_to_transform, layers_pattern: indices of the layers to adapt, and the name of the list that
            holds them ("layers", "h") where the name alone does not tell.
        modules_to_save: modules trained and stored whole, such as a new classification head.
        bias: which base biases train: "none", "all", or "lora_only" (those of adapted modules).
    Size
        init_r, target_r: triplets per matrix at the start and, on average, at the end.
        min_rank, max_rank: bounds for each module, as one number or {module name or ending: number}.
        budget: what is shared out: "triplets", as in the paper, or "params", where a triplet costs what its matrix
            is high and wide. The latter is a hard limit, target_r on average, or target_parameters: an int, or a
            float as a fraction of the base model.
        cost_exponent: with "params", triplets are ranked by importance / cost to this power.
    Step
        lora_alpha, lora_dropout: the increment is scaled by lora_alpha / (init_r + 1e-5) for life, as in the
            authors' code; rescaling by the current rank was tried by them and hurt. None lets `inject` choose
            the number that makes the first step move ΔW as far as LoRA's does (`stepsize`).
        init_lora_weights: "gaussian", N(0, 0.02²) as in the authors' code; "lora", as LoRA begins; "orthogonal"; or
            from data, "gradient" or "activation", which a Trainer finds itself; for other loops see `start`.
        refactor: after each allocation make P and Q orthonormal and Λ the singular values, exactly (`refactoring`).
    Schedule: int = optimizer steps, float in [0, 1) = fraction of the run
        tinit: warm-up with the full budget. tfinal: how long the final pattern trains at the end.
        deltaT: steps between allocations. total_step: length of the run; whoever runs the loop may tell it
            to RankAllocator instead.
    Importance and regularizer
        beta1, beta2: decay of sensitivity and uncertainty (equations 11 and 12).
        importance: how a triplet is scored; see `importance.py`.
        orth_reg_weight: the factor gamma. orth_reg_form: "norm", the mean of unsquared Frobenius norms of
            the authors' code, or "squared", the sum of equation 4.

    Raises ConfigError at construction.
    """

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    bias: Bias = "none"
    init_r: int = 12
    target_r: int = 8
    min_rank: int | Mapping[str, int] = 0
    max_rank: int | Mapping[str, int] | None = None
    budget: Unit = "triplets"
    target_parameters: int | float | None = None
    cost_exponent: float = 0.5
    lora_alpha: float | None = 16.0
    lora_dropout: float = 0.0
    init_lora_weights: Start = "gaussian"
    refactor: bool = False
    tinit: int | float = 0.1
    tfinal: int | float = 0.4
    deltaT: int | float = 0.005
    total_step: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    importance: Importance = "sensitivity*uncertainty"
    orth_reg_weight: float = 0.1
    orth_reg_form: OrthForm = "norm"

    def __post_init__(self) -> None:
        self._normalize_names()
        check_int("init_r", self.init_r, least=1)
        check_int("target_r", self.target_r, least=0)
        if self.target_r > self.init_r:
            raise ConfigError(
                f"target_r ({self.target_r}) is above init_r ({self.init_r}); triplets are only ever pruned, so "
                "start with at least as many as you want to end with."
            )
        self._check_rank_bounds()
        self._check_schedule()
        for name in ("beta1", "beta2"):
            check_real(name, getattr(self, name), above=0.0, below=1.0)
        self._check_budget()
        if self.lora_alpha is not None:
            check_real("lora_alpha", self.lora_alpha, above=0.0)
        if not isinstance(self.refactor, bool):
            raise ConfigError(f"refactor is {self.refactor!r}; it must be true or false.")
        check_real("lora_dropout", self.lora_dropout, least=0.0, below=1.0)
        check_real("orth_reg_weight", self.orth_reg_weight, least=0.0)
        for name, literal in _CHOICES.items():
            if getattr(self, name) not in get_args(literal):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {get_args(literal)}.")

    @property
    def scaling(self) -> float:
        """Factor of the increment; the 1e-5 is in the authors' code and so in every stored adapter."""
        if self.lora_alpha is None:
            raise ConfigError("lora_alpha is not chosen yet; adalora.inject does so, for the shapes of the model.")
        return self.lora_alpha / (self.init_r + 1e-5)

    def for_another_run(self) -> AdaLoraConfig:
        """The same method for a run of unknown length: phases in steps become fractions of the old run, or the
        defaults where its length is unknown."""
        phases: dict[str, Any] = {"total_step": None}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("tinit", "tfinal", "deltaT") and isinstance(value, int):
                phases[field.name] = min(value / self.total_step, 0.99) if self.total_step else field.default
        return dataclasses.replace(self, **phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back to an equal configuration."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def preset(cls, name: str, **fields: Any) -> AdaLoraConfig:
        """A whole method by name, `fields` on top: "paper" is the authors', whatever the defaults are (`presets`)."""
        return cls.from_dict(fields | {"preset": name})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaLoraConfig:
        """Build from plain types, on top of a `preset` if named. Raises ConfigError for a key that is no field."""
        fields, values = [field.name for field in dataclasses.fields(cls)], resolved(values)
        for key in values:
            if key not in fields:
                near = difflib.get_close_matches(str(key), fields, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Fields are: {', '.join(fields)}."
                raise ConfigError(f"AdaLoraConfig has no field {key!r}.{hint}")
        return cls(**values)

    def _normalize_names(self) -> None:
        if not self.target_modules:
            raise ConfigError(f"target_modules is {self.target_modules!r}; name at least one module.")
        for name in (
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
        ):
            value = getattr(self, name)
            entry = int if name == "layers_to_transform" else str
            if value is None or (isinstance(value, entry) and name != "modules_to_save"):
                continue
            if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
                raise ConfigError(f"{name} is {value!r}; give a list of {entry.__name__}.")
            entries = tuple(sorted(value) if isinstance(value, set) else value)
            if not all(isinstance(item, entry) for item in entries):
                raise ConfigError(f"{name} is {value!r}; every entry must be {entry.__name__}.")
            object.__setattr__(self, name, entries)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_pattern(name, getattr(self, name))
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern does nothing without layers_to_transform; set both or neither.")

    def _check_budget(self) -> None:
        check_real("cost_exponent", self.cost_exponent, least=0.0)
        goal = self.target_parameters
        if goal is None:
            return
        if self.budget != "params":
            raise ConfigError(f"target_parameters is {goal!r}, which counts only with budget='params'; set that too.")
        if isinstance(goal, float):
            check_real("target_parameters", goal, above=0.0, below=1.0)
        else:
            check_int("target_parameters", goal, least=0)

    def _check_rank_bounds(self) -> None:
        for name in ("min_rank", "max_rank"):
            bound = getattr(self, name)
            if isinstance(bound, Mapping):
                object.__setattr__(self, name, dict(bound))
                for key, value in bound.items():
                    check_int(f"{name}[{key!r}]", value, least=0, most=self.init_r)
            elif name == "min_rank" or bound is not None:
                check_int(name, bound, least=0, most=self.init_r)
        if isinstance(self.min_rank, int) and isinstance(self.max_rank, int) and self.min_rank > self.max_rank:
            raise ConfigError(f"min_rank ({self.min_rank}) is above max_rank ({self.max_rank}).")
        if isinstance(self.min_rank, Mapping) and isinstance(self.max_rank, Mapping):
            for key in self.min_rank.keys() & self.max_rank.keys():
                if self.min_rank[key] > self.max_rank[key]:
                    raise ConfigError(
                        f"for {key!r} min_rank is {self.min_rank[key]}, above max_rank {self.max_rank[key]}."
                    )

    def _check_schedule(self) -> None:
        for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            value = getattr(self, name)
            if isinstance(value, float):
                if not 0.0 <= value < 1.0:
                    steps = round(value) if 1.0 <= value < math.inf else 100
                    raise ConfigError(
                        f"{name} is {value}; a float is a fraction of the run and lies in [0, 1). For a number "
                        f"of steps write an int, such as {name}={steps}."
                    )
            else:
                check_int(name, value, least=least)
        if self.total_step is not None:
            check_int("total_step", self.total_step, least=1)
        both = [value for value in (self.tinit, self.tfinal) if isinstance(value, float)]
        if len(both) == 2 and sum(both) >= 1.0:
            raise ConfigError(
                f"tinit ({self.tinit}) and tfinal ({self.tfinal}) leave nothing of the run to reduce the budget in; "
                "their sum must be below 1."
            )
        if self.total_step is not None:
            Schedule.from_config(self, initial_budget=1, target_budget=0, total_step=self.total_step)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
