"""AdaLoraConfig: what it refuses, how it travels, and that no field is dead."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adalora
from adalora import presets
from adalora.errors import ConfigError
from adalora.injection import named_adapters
from adalora.methods.adalora import AdaLora
from adalora.reading import read_adapter

Config = adalora.AdaLoraConfig

# settings, and what the message must say: field, value, remedy.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no target": ({"target_modules": []}, r"target_modules is \[\]; name at least one module"),
    "empty target": ({"target_modules": ""}, "target_modules is ''; name at least one"),
    "target of wrong type": ({"target_modules": 3}, "target_modules is 3; give a list of str"),
    "target of wrong entries": ({"target_modules": ["q", 3]}, r"target_modules is \['q', 3\]; every entry must be str"),
    "target no regex": (
        {"target_modules": "(q"},
        r"target_modules is '\(q', which is no regular expression .*list plain names",
    ),
    "exclusion no regex": ({"exclude_modules": "*q"}, r"exclude_modules is '\*q', which is no regular expression"),
    "exclusion of wrong type": ({"exclude_modules": {"q": 1}}, "exclude_modules is {'q': 1}; give a list of str"),
    "layers by name": ({"layers_to_transform": ["1"]}, r"layers_to_transform is \['1'\]; every entry must be int"),
    "layers as text": ({"layers_to_transform": "1"}, "layers_to_transform is '1'; give a list of int"),
    "pattern without layers": (
        {"layers_pattern": "h"},
        "layers_pattern does nothing without layers_to_transform; set both",
    ),
    "pattern no regex": (
        {"layers_pattern": ["h["], "layers_to_transform": 1},
        r"layers_pattern is \('h\[',\), which is no regular expression",
    ),
    "saved as text": ({"modules_to_save": "head"}, "modules_to_save is 'head'; give a list of str"),
    "unknown bias": ({"bias": "some"}, r"bias is 'some'; choose one of \('none', 'all', 'lora_only'\)"),
    "no rank": ({"init_r": 0, "target_r": 0}, "init_r is 0; it must be at least 1"),
    "rank of wrong type": ({"init_r": 8.0}, r"init_r is 8\.0 \(float\); it must be an int"),
    "rank of True": ({"init_r": True}, r"init_r is True \(bool\); it must be an int"),
    "negative target rank": ({"target_r": -1}, "target_r is -1; it must be at least 0"),
    "target above start": (
        {"init_r": 4, "target_r": 5},
        r"target_r \(5\) is above init_r \(4\); .*start with at least as many",
    ),
    "negative minimum": ({"min_rank": -1}, r"min_rank is -1; it must be between 0 and init_r \(12\)"),
    "minimum above start": ({"min_rank": 13}, r"min_rank is 13; it must be between 0 and init_r \(12\)"),
    "no minimum": ({"min_rank": None}, r"min_rank is None \(NoneType\); it must be an int"),
    "minimum of one, wrong": ({"min_rank": {"q": 13}}, r"min_rank\['q'\] is 13; it must be between 0 and init_r"),
    "minimum of one, none": ({"min_rank": {"q": None}}, r"min_rank\['q'\] is None \(NoneType\); it must be an int"),
    "maximum above start": ({"max_rank": 13}, r"max_rank is 13; it must be between 0 and init_r \(12\)"),
    "maximum of one, none": ({"max_rank": {"q": None}}, r"max_rank\['q'\] is None \(NoneType\); it must be an int"),
    "minimum above maximum": ({"min_rank": 5, "max_rank": 3}, r"min_rank \(5\) is above max_rank \(3\)"),
    "no alpha": ({"lora_alpha": 0}, r"lora_alpha is 0; it must be above 0\.0 and finite"),
    "alpha not finite": ({"lora_alpha": float("inf")}, r"lora_alpha is inf; it must be above 0\.0 and finite"),
    "alpha not a number": ({"lora_alpha": float("nan")}, "lora_alpha is nan; it must be above 0"),
    "alpha as text": ({"lora_alpha": "16"}, r"lora_alpha is '16' \(str\); it must be a number"),
    "dropout of everything": ({"lora_dropout": 1.0}, r"lora_dropout is 1\.0; it must be at least 0\.0 and below 1\.0"),
    "negative dropout": ({"lora_dropout": -0.1}, r"lora_dropout is -0\.1; it must be at least 0\.0"),
    "warm-up above 1": (
        {"tinit": 1.5},
        r"tinit is 1\.5; a float is a fraction.*\[0, 1\).*write an int, such as tinit=2\.",
    ),
    "warm-up negative": ({"tinit": -0.5}, r"tinit is -0\.5; a float is a fraction.*write an int, such as tinit=100\."),
    "warm-up not a number": ({"tinit": float("nan")}, "tinit is nan; a float is a fraction"),
    "warm-up of -1": ({"tinit": -1}, "tinit is -1; it must be at least 0"),
    "final phase as text": ({"tfinal": "0.4"}, r"tfinal is '0\.4' \(str\); it must be an int"),
    "interval of 0": ({"deltaT": 0}, "deltaT is 0; it must be at least 1"),
    "interval of 10.0": ({"deltaT": 10.0}, r"deltaT is 10\.0; .*write an int, such as deltaT=10\."),
    "fractions fill the run": (
        {"tinit": 0.5, "tfinal": 0.5},
        r"tinit \(0\.5\) and tfinal \(0\.5\).*sum must be below 1",
    ),
    "no steps": ({"total_step": 0}, "total_step is 0; it must be at least 1"),
    "beta1 of 0": ({"beta1": 0.0}, r"beta1 is 0\.0; it must be above 0\.0 and below 1\.0"),
    "beta1 of 1": ({"beta1": 1}, r"beta1 is 1; it must be above 0\.0 and below 1\.0"),
    "beta2 of 1": ({"beta2": 1.0}, r"beta2 is 1\.0; it must be above 0\.0 and below 1\.0"),
    "unknown importance": (
        {"importance": "taylor"},
        r"importance is 'taylor'; choose one of \('sensitivity\*uncertainty'",
    ),
    "unknown unit": ({"budget": "parameters"}, r"budget is 'parameters'; choose one of \('triplets', 'params'\)"),
    "goal of triplets": (
        {"target_parameters": 1000},
        "target_parameters is 1000, which counts only with budget='params'; set that too",
    ),
    "goal above all": (
        {"budget": "params", "target_parameters": 1.5},
        r"target_parameters is 1\.5; it must be above 0\.0 and below 1\.0",
    ),
    "negative exponent": ({"cost_exponent": -1}, r"cost_exponent is -1; it must be at least 0\.0"),
    "unknown start": ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa'; choose one of \('gaussian'"),
    "refactor of 1": ({"refactor": 1}, "refactor is 1; it must be true or false"),
    "negative weight": ({"orth_reg_weight": -0.1}, r"orth_reg_weight is -0\.1; it must be at least 0\.0"),
    "unknown form": ({"orth_reg_form": "frd"}, r"orth_reg_form is 'frd'; choose one of \('norm', 'squared'\)"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_field_value_and_remedy(settings: dict[str, Any], message: str) -> None:
    """Peers B1 and B2: at construction, not in mid-run."""
    with pytest.raises(ConfigError, match=message):
        Config(**settings)
    with pytest.raises(ValueError, match=message):  # also what a caller without this package's names would catch
        Config.from_dict(settings)


def test_every_field_has_a_refusal() -> None:
    refused = {name for settings, _ in REFUSED.values() for name in settings}
    assert refused == {field.name for field in dataclasses.fields(Config)}


def test_a_configuration_cannot_be_changed() -> None:
    config = Config(min_rank={"q": 1})
    for field in dataclasses.fields(Config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, 1)
    limits = {"q": 1}
    config = Config(min_rank=limits)
    limits["q"] = 100
    assert config.min_rank == {"q": 1}


def test_fields_are_given_by_name_only() -> None:
    with pytest.raises(TypeError):
        Config(["query"])  # type: ignore[misc]


EXAMPLES: list[dict[str, Any]] = [
    {},
    {"target_modules": ["q", "v"], "exclude_modules": ["x"], "modules_to_save": ["head"], "bias": "all"},
    {"target_modules": r".*\.q", "exclude_modules": r"head.*", "layers_to_transform": [1, 2], "layers_pattern": "h"},
    {"target_modules": {"v", "q"}, "layers_to_transform": 3, "layers_pattern": ["h", "layers"]},
    {"min_rank": {"q": 1}, "max_rank": {"v": 3}, "init_r": 6, "target_r": 2},
    {"budget": "params", "target_parameters": 0.001, "cost_exponent": 1, "lora_alpha": None, "refactor": True},
    {"tinit": 3, "tfinal": 0.5, "deltaT": 7, "total_step": 90, "beta1": 0.5, "beta2": 0.9, "lora_alpha": 32},
    {"importance": "magnitude", "orth_reg_form": "squared", "orth_reg_weight": 0, "lora_dropout": 0.1, "max_rank": 4},
]


@pytest.mark.parametrize("settings", EXAMPLES)
def test_round_trip_through_json_gives_an_equal_configuration(settings: dict[str, Any]) -> None:
    config = Config(**settings)
    text = json.dumps(config.to_dict())
    assert Config.from_dict(json.loads(text)) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(Config)}


def test_steps_and_fractions_stay_apart_in_json() -> None:
    """0 steps and 0.0 of the run are the same; 1 and a fraction are not."""
    values = json.loads(json.dumps(Config(tinit=0, tfinal=0.0, deltaT=1).to_dict()))
    assert [type(values[name]) for name in ("tinit", "tfinal", "deltaT")] == [int, float, int]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("target_rank", "Did you mean 'target_r'?"),
        ("lora_alfa", "Did you mean 'lora_alpha'?"),
        ("tfinall", "Did you mean 'tfinal'?"),
        ("delta_T", "Did you mean 'deltaT'?"),
        ("rank_pattern", "AdaLoraConfig has no field 'rank_pattern'."),
        ("use_dora", "Fields are: target_modules, exclude_modules"),
        ("r", "AdaLoraConfig has no field 'r'."),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(key: str, hint: str) -> None:
    """Peers B7: `r`, which PEFT takes and ignores, is not taken."""
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({key: 1})
    assert hint in str(caught.value)


def test_scaling_is_alpha_over_the_initial_rank_as_in_stored_adapters() -> None:
    assert Config(lora_alpha=32, init_r=12).scaling == 32 / 12.00001


# --- Presets ------------------------------------------------------------------------------------------------

# The authors' method. This table is not the library's: a default that changes must not change it.
PAPER: dict[str, Any] = {
    "init_r": 12, "target_r": 8, "min_rank": 0, "max_rank": None, "budget": "triplets", "target_parameters": None,
    "cost_exponent": 0.5, "lora_alpha": 16.0, "lora_dropout": 0.0, "init_lora_weights": "gaussian", "refactor": False,
    "tinit": 0.1, "tfinal": 0.4, "deltaT": 0.005, "beta1": 0.85, "beta2": 0.85,
    "importance": "sensitivity*uncertainty", "orth_reg_weight": 0.1, "orth_reg_form": "norm",
}  # fmt: skip
# Which modules train, and how long, are the user's.
FREE = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "total_step",
}  # fmt: skip


def test_the_papers_preset_writes_out_every_field_of_the_method() -> None:
    preset = Config.preset("paper").to_dict()
    assert {name: value for name, value in preset.items() if name not in FREE} == PAPER
    assert set(preset) == set(PAPER) | FREE  # a new field must be given its value in the paper here
    assert set(presets.PAPER) == set(PAPER)  # written out, not left to a default


def test_explicit_fields_win_over_the_preset_and_what_is_stored_is_resolved(tmp_path: Path) -> None:
    given = {
        "target_modules": ["0"],
        "orth_reg_weight": 0.3,
        "tinit": 600,
        "tfinal": 1800,
        "init_lora_weights": "orthogonal",
    }
    config = Config.preset("paper", **given)
    assert config.to_dict() == Config(**given).to_dict() | PAPER | given
    assert Config.from_dict({**given, "preset": "paper"}) == config
    method = AdaLora({**given, "preset": "paper"})
    assert method.config == config and method.options() == config.to_dict()
    model = adalora.inject(nn.Sequential(nn.Linear(20, 20)), dataclasses.replace(config, init_r=3, target_r=3))
    adalora.save_adapter(model, tmp_path / "a", warn=False)
    stored = read_adapter(tmp_path / "a").config.to_dict()
    assert stored == config.to_dict() | {"init_r": 3, "target_r": 3}  # fields, no name of a preset


@pytest.mark.parametrize(
    "values,message",
    [
        ({"preset": "papre"}, "preset is 'papre'; choose one of paper"),
        ({"preset": ["paper"]}, r"preset is \['paper'\]"),
        ({"preset": "paper", "targetr": 1}, "no field 'targetr'. Did you mean 'target_r'"),
    ],
)
def test_a_preset_that_does_not_exist_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(values)


# --- No dead field ------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two lists of one layer each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 5)])
        self.tower = nn.ModuleList([nn.Linear(5, 9), nn.Linear(9, 5)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in [*self.layers, *self.tower]:
            x = torch.tanh(layer(x))
        return self.head(x)


BASE: dict[str, Any] = {
    "target_modules": ["0", "1"],
    "layers_to_transform": [0, 1],
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 5,
    "deltaT": 3,
}
# What a field needs to have a meaning at all.
GIVEN: dict[str, dict[str, Any]] = {
    "target_parameters": {"budget": "params"},
    "cost_exponent": {"budget": "params", "layers_to_transform": None},
}
CHANGES: dict[str, Any] = {
    "budget": "params",
    "target_parameters": 50,
    "cost_exponent": 20.0,
    "init_lora_weights": "orthogonal",
    "refactor": True,
    "target_modules": ["0", "head"],
    "exclude_modules": ["layers.1"],
    "layers_to_transform": [0],
    "layers_pattern": "tower",
    "modules_to_save": ["head"],
    "bias": "lora_only",
    "init_r": 5,
    "target_r": 1,
    "min_rank": 2,
    "max_rank": 3,
    "lora_alpha": 8.0,
    "lora_dropout": 0.5,
    "tinit": 6,
    "tfinal": 12,
    "deltaT": 4,
    "total_step": 25,
    "beta1": 0.5,
    "beta2": 0.5,
    "importance": "magnitude",
    "orth_reg_weight": 0.5,
    "orth_reg_form": "squared",
}


def outcome(config: adalora.AdaLoraConfig) -> tuple[Any, ...]:
    """Twenty steps with the configuration: what trained, to which values, by which importance, on which triplets."""

    def averages() -> list[dict[str, Any]]:
        states = optimizer.state.values()
        return [{key: value.tolist() for key, value in state.items() if "adalora" in key} for state in states]

    torch.manual_seed(0)
    model = adalora.inject(Net(), config)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.05)
    allocator, heard = adalora.RankAllocator(model, None if config.total_step else 20), []
    allocator.attach(optimizer).on_allocate.append(lambda step, budget, keep: heard.append((step, budget, averages())))
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = torch.randn(8, 5), torch.randn(8, 3)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return (
        {name: p.tolist() for name, p in model.named_parameters() if p.requires_grad},
        {name: module.lora_keep.tolist() for name, module in named_adapters(model)},
        heard,
    )


@pytest.fixture(scope="module")
def usual() -> tuple[Any, ...]:
    torch.set_num_threads(1)
    return outcome(Config(**BASE))


def test_equal_configurations_train_equally(usual: tuple[Any, ...]) -> None:
    assert outcome(Config(**BASE)) == usual


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_every_field_changes_what_training_does(field: str, usual: tuple[Any, ...]) -> None:
    """Peers B7: a field that would do nothing does not exist."""
    base = BASE | GIVEN.get(field, {})
    assert outcome(Config(**base | {field: CHANGES[field]})) != (outcome(Config(**base)) if field in GIVEN else usual)


def test_a_schedule_that_cannot_run_is_refused_at_construction() -> None:
    with pytest.raises(ConfigError, match="must leave steps for reducing"):
        adalora.AdaLoraConfig(tinit=100, tfinal=100, total_step=50)
    with pytest.raises(ConfigError, match="for 'q' min_rank is 3, above max_rank 2"):
        adalora.AdaLoraConfig(min_rank={"q": 3}, max_rank={"q": 2})
