"""LoRA with the rank pattern that a finished AdaLoRA run found: a control for what the pattern alone is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..config import AdaLoraConfig
from ..errors import ConfigError, InjectionError
from ..reading import CONFIG_FILE, read_adapter
from ..targets import refusal
from .lora import Lora, shape_of, wrap
from .options import check_counts, check_lora, check_parameters, is_count, with_head
from .ranks import permuted


class StaticLora(Lora):
    """Options: pattern, permute, r, lora_alpha, lora_dropout, modules_to_save, parameters.

    `pattern` is the folder of a run, or of an adapter in the AdaLoRA format, or {module: rank} itself, which is what
    the resolved recipe has. `permute`, a seed, deals the ranks out anew among matrices of equal cost in + out.
    Matrices of rank 0 are left out. The scale is lora_alpha / r; without r, r is that of a uniform LoRA of the same
    size. `parameters` is a limit: a pattern that costs more is refused.
    """

    name: ClassVar[str] = "static-lora"
    defaults: ClassVar[dict[str, Any]] = {
        "pattern": None,
        "permute": None,
        "r": None,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "parameters": None,
    }

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap in a PeftModel."""
        given = self._options
        pattern, config = self._pattern(), AdaLoraConfig(modules_to_save=given["modules_to_save"])
        costs = _costs(model, pattern)
        if given["permute"] is not None:
            pattern = permuted(pattern, costs, given["permute"])
        size, limit = sum(rank * costs[name] for name, rank in pattern.items()), given["parameters"]
        if limit is not None and size > limit:
            raise ConfigError(f"the pattern costs {size} parameters, more than parameters={limit}; raise that.")
        uniform = given["r"] or max(round(size / sum(costs.values())), 1)
        scale = given["lora_alpha"] / uniform
        return wrap(model, with_head(model, config), pattern, scale, given["lora_dropout"])

    def options(self) -> dict[str, Any]:
        """All options, defaults resolved; the pattern as ranks, so that the run it came from may go."""
        return self._options | {"pattern": self._pattern()}

    def _check(self) -> None:
        given, pattern = self._options, self._options["pattern"]
        if not isinstance(pattern, str | Path | Mapping) or not pattern:
            raise ConfigError(f"pattern is {pattern!r}; give the folder of a finished AdaLoRA run.")
        for name, rank in pattern.items() if isinstance(pattern, Mapping) else ():
            if not (is_count(rank) or (rank == 0 and rank is not False)):
                raise ConfigError(f"pattern[{name!r}] is {rank!r}; give a whole number of at least 0.")
        if given["r"] is not None:
            check_counts(given, "r")
        if not (given["permute"] is None or is_count(given["permute"]) or given["permute"] == 0):
            raise ConfigError(f"permute is {given['permute']!r}; give a seed, a whole number of at least 0.")
        check_lora(given)
        check_parameters(given, "the pattern's own size")

    def _pattern(self) -> dict[str, int]:
        pattern = self._options["pattern"]
        if isinstance(pattern, Mapping):
            return dict(pattern)
        folder = Path(pattern)
        own = folder / "adapter" if (folder / "adapter" / CONFIG_FILE).is_file() else folder
        return {name: len(E) for name, (_, E, _) in read_adapter(own).factors.items()}


def _costs(model: nn.Module, pattern: Mapping[str, int]) -> dict[str, int]:
    modules, costs = dict(model.named_modules()), {}
    for name in pattern:
        if name not in modules:
            raise InjectionError(f"the pattern names {name!r}, but {type(model).__name__} has no such module.")
        reason = refusal(modules[name], modules[name.rpartition(".")[0]])
        if reason:
            raise InjectionError(f"the pattern names {name!r} ({type(modules[name]).__name__}): {reason}")
        costs[name] = sum(shape_of(modules[name]))
    return costs
