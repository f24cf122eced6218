"""Whole methods by name, written out, so that they stay what they are when defaults change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

# arXiv 2303.10512 as the authors' code has it: the larger budget of table 7, alpha of their MNLI script. Their phases
# differ from task to task, from .09 to .18 of the run for tinit and .44 to .58 for tfinal; the built-in recipes paper/…
# have them in steps.
PAPER: dict[str, Any] = {
    "init_r": 12,
    "target_r": 8,
    "min_rank": 0,
    "max_rank": None,
    "budget": "triplets",
    "target_parameters": None,
    "cost_exponent": 0.5,  # without a meaning for triplets
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "init_lora_weights": "gaussian",
    "refactor": False,
    "tinit": 0.1,
    "tfinal": 0.4,
    "deltaT": 0.005,
    "beta1": 0.85,
    "beta2": 0.85,
    "importance": "sensitivity*uncertainty",
    "orth_reg_weight": 0.1,
    "orth_reg_form": "norm",
}
PRESETS = {"paper": PAPER}


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` on top of the preset that their key `preset` names, if any. Raises ConfigError for an unknown one."""
    given = dict(values)
    if "preset" not in given:
        return given
    name = given.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}, or leave it out.")
    return PRESETS[name] | given
