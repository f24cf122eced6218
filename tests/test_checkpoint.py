"""The adapter folder: what is stored, both directions with PEFT, and what happens to a model that loads."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adalora import (
    AdaLoraConfig,
    AdaLoraWarning,
    RankAllocator,
    adapter_parameters,
    eject,
    inject,
    load_adapter,
    save_adapter,
)
from adalora.errors import AdapterFileError
from adalora.injection import adapter_config, named_adapters
from tiny import TOKENS, adapted, assert_unchanged, bert, gpt2, net, pair, peft_warnings, relative, snapshot

FACTORS = ("lora_A", "lora_E", "lora_B")


def peft_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): tuple(getattr(module, part)["default"].detach() for part in FACTORS)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.adalora.layer.AdaLoraLayer)
    }


def live_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {
        name: (module.lora_A[keep].detach(), module.lora_E[keep].detach(), module.lora_B[:, keep].detach())
        for name, module in named_adapters(model)
        for keep in [module.lora_keep]
    }


def assert_same(found: dict[str, tuple[Tensor, ...]], wanted: dict[str, tuple[Tensor, ...]]) -> None:
    assert found.keys() == wanted.keys()
    for name, factors in wanted.items():
        for part, ours, theirs in zip(FACTORS, found[name], factors, strict=True):
            assert ours.shape == theirs.shape, (name, part)
            assert torch.equal(ours, theirs), (name, part)


def peft_trained(model: Any, steps: int = 12, out: Tensor | None = None, **choices: Any) -> Any:
    """PEFT's AdaLoRA after real optimizer steps with its allocator."""
    schedule = {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 1}
    config = peft.AdaLoraConfig(**({"init_r": 4, "target_r": 2, "lora_alpha": 8} | schedule | choices))
    with peft_warnings():
        model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        (model(TOKENS)[0] - 3).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def peft_load(model: Any, folder: Path) -> Any:
    with peft_warnings():
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def peft_save(model: Any, folder: Path) -> None:
    with peft_warnings():
        model.save_pretrained(str(folder))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


# --- ours to ours, ours to PEFT -------------------------------------------------------------------------


OURS = {
    "linear": (bert, {"target_modules": ["query", "value", "output.dense"], "modules_to_save": ["classifier"]}),
    "all-linear": (bert, {"exclude_modules": ["classifier"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "bias all": (bert, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "bias lora_only": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "conv1d bias": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "conv2d": (net, {"target_modules": ["conv", "linear"], "modules_to_save": ["head"]}),
}


@pytest.mark.parametrize("case", OURS)
def test_our_folder_loads_in_peft_with_the_same_parameters(tmp_path: Path, case: str) -> None:
    build, choices = OURS[case]
    model = adapted(build(), [2, 0, 4, 1], **choices)
    assert save_adapter(model, tmp_path / "a") == 0.0
    loaded = peft_load(build(), tmp_path / "a")
    assert_same(peft_factors(loaded), live_factors(model))
    assert any(module.rank == 0 for _, module in named_adapters(model))
    assert relative(logits(loaded), logits(model)) <= 1e-6


@pytest.mark.parametrize("case", [*OURS, "embedding and grouped"])
def test_our_folder_loads_in_ours_bit_for_bit(tmp_path: Path, case: str) -> None:
    build, choices = OURS.get(case, (net, {"target_modules": ["embed", "grouped", "line"], "bias": "all"}))
    model = adapted(build(), [2, 0, 4, 1], **choices)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(build(), tmp_path / "a")
    assert_same(live_factors(loaded), live_factors(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    own = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in FACTORS}
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert name in own or torch.equal(state[name], value), name
    assert relative(logits(loaded), logits(model)) <= 1e-6  # pruned rows were summed as zeros before


def test_saving_twice_writes_the_same_content(tmp_path: Path) -> None:
    model = adapted(bert(), [3, 1], target_modules=["query"])
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name)
    (config, weights), (config2, weights2) = (sorted((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert (config.name, weights.name) == ("adapter_config.json", "adapter_model.safetensors")
    assert config.read_bytes() == config2.read_bytes()
    with safe_open(weights, framework="pt") as first, safe_open(weights2, framework="pt") as second:
        assert first.metadata() == second.metadata()  # which hold the checksum of the tensors


def test_saving_again_after_loading_stores_the_same_tensors(tmp_path: Path) -> None:
    model = adapted(bert(), [3, 0, 1], target_modules=["query"], modules_to_save=["classifier"], bias="all")
    save_adapter(model, tmp_path / "a")
    save_adapter(load_adapter(bert(), tmp_path / "a"), tmp_path / "b")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_name_that_is_the_ending_of_another_means_one_module_only_in_peft(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"layer": nn.ModuleDict({"q": nn.Linear(4, 4)}), "x": nn.ModuleDict({"layer": pair()})})

    model = nested()
    model["x"]["layer"].q = nn.Linear(4, 4)
    base = nested()
    base["x"]["layer"].q = nn.Linear(4, 4)
    adapted(model, [2], target_modules=["layer.q"], exclude_modules=r"x\..*")
    assert list(live_factors(model)) == ["layer.q"]
    save_adapter(model, tmp_path / "a")
    assert list(peft_factors(peft_load(base, tmp_path / "a"))) == ["layer.q"]


# --- PEFT to ours ---------------------------------------------------------------------------------------


THEIRS = {
    "linear": (bert, {"target_modules": ["query", "value", "output.dense"]}),
    "classifier": (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "sequence classification": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bias all": (bert, {"target_modules": ["query", "key"], "bias": "all", "modules_to_save": ["classifier"]}),
    "bias lora_only": (bert, {"target_modules": ["query", "key"], "bias": "lora_only"}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv2d": (net, {"target_modules": ["conv", "linear"], "modules_to_save": ["head"]}),
    "regex and dropout": (bert, {"target_modules": r".*\.(query|key)", "lora_dropout": 0.1}),
    "target above start": (bert, {"target_modules": ["query"], "init_r": 2, "target_r": 2, "lora_alpha": 1}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_peft_folder_loads_with_the_same_parameters(tmp_path: Path, case: str) -> None:
    build, choices = THEIRS[case]
    theirs = peft_trained(build(), steps=0 if case == "target above start" else 12, **choices)
    wanted = logits(theirs)
    peft_save(theirs, tmp_path)
    loaded = load_adapter(build(), tmp_path)  # without any warning: row E7
    assert_same(live_factors(loaded), peft_factors(peft_load(build(), tmp_path)))
    assert relative(logits(loaded), wanted) <= 1e-6
    assert case == "target above start" or (logits(build()) - wanted).abs().max() > 1e-2
    ranks = [module.rank for _, module in named_adapters(loaded)]
    assert sum(ranks) == 2 * len(ranks)


def test_peft_folder_with_a_module_of_rank_zero_loads(tmp_path: Path) -> None:
    theirs = peft_trained(bert(), steps=12, target_modules=["query", "key", "value"], target_r=1)
    pattern = theirs.peft_config["default"].rank_pattern
    dead = next(name for name in pattern if sum(pattern[name]) == 0)
    peft_save(theirs, tmp_path)
    loaded = load_adapter(bert(), tmp_path)
    assert_same(live_factors(loaded), peft_factors(peft_load(bert(), tmp_path)))
    module = loaded.get_submodule(dead.partition(".lora_E")[0])
    assert (module.rank, module.capacity, tuple(module.lora_B.shape)) == (0, 0, (16, 0))
    assert torch.equal(module.delta_weight(), torch.zeros(16, 16))


def test_peft_folder_that_was_never_pruned_loads(tmp_path: Path) -> None:
    theirs = peft_trained(bert(), steps=2, target_modules=["query"])
    assert theirs.peft_config["default"].rank_pattern is None
    peft_save(theirs, tmp_path)
    loaded = load_adapter(bert(), tmp_path)
    assert [module.rank for _, module in named_adapters(loaded)] == [4, 4]
    assert_same(live_factors(loaded), peft_factors(theirs))


def test_peft_folder_without_a_schedule_loads_here_though_not_there(tmp_path: Path) -> None:
    """Row B6: adapters of old versions hold total_step null."""
    theirs = peft_trained(bert(), target_modules=["query"])
    peft_save(theirs, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"total_step": None}))
    with pytest.raises(ValueError, match="total_step"):
        peft_load(bert(), tmp_path)
    assert relative(logits(load_adapter(bert(), tmp_path)), logits(theirs)) <= 1e-6


@pytest.mark.parametrize("alpha", [0, -3])
def test_peft_folder_without_a_scale_computes_what_was_trained(tmp_path: Path, alpha: int) -> None:
    """Row E9: PEFT itself changes the output on reload, because it then divides kept by initial rank."""
    theirs = peft_trained(bert(), target_modules=["query", "dense"], lora_alpha=alpha)
    peft_save(theirs, tmp_path)
    wanted = logits(theirs)
    loaded = load_adapter(bert(), tmp_path)
    assert {module.scaling for _, module in named_adapters(loaded)} == {4 / 4.00001}
    assert relative(logits(loaded), wanted) <= 1e-6
    again = peft_load(bert(), tmp_path)
    pattern = theirs.peft_config["default"].rank_pattern
    name = next("base_model.model." + key.removesuffix(".lora_E") for key in pattern if 0 < sum(pattern[key]) < 4)
    kept = again.get_submodule(name).lora_E["default"].shape[0]
    before, after = (model.get_submodule(name).get_delta_weight("default") for model in (theirs, again))
    assert relative(after, before * kept / 4) <= 1e-6


# --- what is stored -------------------------------------------------------------------------------------


def train(model: nn.Module, steps: int, total: int = 20) -> RankAllocator:
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.05)
    allocator = RankAllocator(model, total_step=total).attach(optimizer)
    for _ in range(steps):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return allocator


@pytest.mark.parametrize("steps", [7, 9, 13])
def test_a_save_between_allocations_stores_what_the_model_computes(tmp_path: Path, steps: int) -> None:
    """Row E3: pruned triplets grow again until the next allocation, and count."""
    model = inject(pair(), AdaLoraConfig(init_r=4, target_r=1, deltaT=5, tinit=2, tfinal=5, orth_reg_weight=0.0))
    allocator = train(model, steps)
    grown = sum(int((module.lora_E != 0).sum()) for _, module in named_adapters(model))
    assert allocator.live < grown
    with pytest.warns(AdaLoraWarning, match=f"holds {grown} triplets, its budget is 2"):
        assert save_adapter(model, tmp_path) == 0.0
    x = torch.randn(5, 6)
    model.eval()
    assert relative(load_adapter(pair(), tmp_path)(x), model(x)) <= 1e-6


def test_after_the_final_phase_exactly_the_budget_is_stored(tmp_path: Path) -> None:
    model = inject(pair(), AdaLoraConfig(init_r=4, target_r=1, deltaT=3, tinit=2, tfinal=5))
    train(model, 20)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sum(map(sum, config["rank_pattern"].values())) == 2
    assert {len(keep) for keep in config["rank_pattern"].values()} == {4}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.shape[0] for key, value in tensors.items() if key.endswith("lora_E")) == 2
    assert [config[name] for name in ("tinit", "tfinal", "deltaT", "total_step")] == [2, 5, 3, 20]


def test_a_pruned_adapter_loads_at_its_rank_and_trains_on_to_the_exact_budget(tmp_path: Path) -> None:
    """Rows E1, E2 and E5: layers are built at the stored ranks, and a new allocator starts from them."""
    model = inject(pair(), AdaLoraConfig(init_r=4, target_r=2, deltaT=5, tinit=2, tfinal=5))
    train(model, 9)
    with pytest.warns(AdaLoraWarning, match="its budget is 4"):
        save_adapter(model, tmp_path / "middle")
    loaded = load_adapter(pair(), tmp_path / "middle", trainable=True)
    capacity = sum(module.capacity for _, module in named_adapters(loaded))
    assert capacity == sum(int((m.lora_keep | (m.lora_E.view(-1) != 0)).sum()) for _, m in named_adapters(model))
    assert len(adapter_parameters(loaded)) == 6
    allocator = train(loaded, 20)
    assert (allocator.schedule.initial_budget, allocator.live) == (capacity, 4)
    save_adapter(loaded, tmp_path / "end")
    again = train(load_adapter(pair(), tmp_path / "end", trainable=True), 20)
    assert (again.schedule.initial_budget, again.live) == (4, 4)


def test_trainable_loading_trains_saved_modules_and_biases_too(tmp_path: Path) -> None:
    choices = {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}
    model = adapted(bert(), **choices)
    save_adapter(model, tmp_path)
    loaded = load_adapter(bert(), tmp_path, trainable=True)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trains
    assert len(trains) == 2 * 4 + 2


def test_saved_modules_may_hold_counters_and_tied_tensors(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = pair()
        model.norm = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
        model.norm[2].weight = model.norm[1].weight
        return model

    model = adapted(build(), target_modules=["first"], modules_to_save=["norm"])
    model.norm[0].num_batches_tracked += 7
    save_adapter(model, tmp_path)
    loaded = load_adapter(build(), tmp_path)
    assert loaded.norm[0].num_batches_tracked == 7
    assert loaded.norm[2].weight is loaded.norm[1].weight
    assert torch.equal(loaded.norm[1].weight, model.norm[1].weight)


def test_a_head_with_tied_biases_is_stored(tmp_path: Path) -> None:
    model = adapted(bert(kind="BertForMaskedLM"), target_modules=["query"], modules_to_save=["cls"])
    save_adapter(model, tmp_path)
    loaded = load_adapter(bert(kind="BertForMaskedLM"), tmp_path)
    assert relative(logits(loaded), logits(model)) <= 1e-6


@pytest.mark.parametrize("place", ["lora_E", "weight"])
def test_values_that_are_not_finite_replace_no_folder(tmp_path: Path, place: str) -> None:
    model = adapted(bert(), target_modules=["query"], modules_to_save=["classifier"])
    save_adapter(model, tmp_path / "a")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    with torch.no_grad():
        owner = model.bert.encoder.layer[0].attention.self.query if place == "lora_E" else model.classifier
        getattr(owner, place)[-1, 0] = float("nan")
    with pytest.raises(AdapterFileError, match=rf"nothing was written: .*{place}.* not finite"):
        save_adapter(model, tmp_path / "a")
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before


EVERY_FIELD = {
    "target_modules": ["query", "value"],
    "exclude_modules": r".*layer\.7.*",
    "layers_to_transform": [0, 1],
    "layers_pattern": "layer",
    "modules_to_save": ["classifier"],
    "bias": "lora_only",
    "init_r": 5,
    "target_r": 3,
    "min_rank": {"query": 1},
    "max_rank": {"value": 4},
    "lora_alpha": 7.5,
    "lora_dropout": 0.25,
    "tinit": 0.2,
    "tfinal": 6,
    "deltaT": 3,
    "total_step": 40,
    "beta1": 0.8,
    "beta2": 0.9,
    "importance": "sensitivity",
    "budget": "params",
    "target_parameters": 0.05,
    "cost_exponent": 0.7,
    "init_lora_weights": "orthogonal",
    "refactor": True,
    "orth_reg_weight": 0.3,
    "orth_reg_form": "squared",
}


def test_every_field_of_the_configuration_comes_back(tmp_path: Path) -> None:
    config = AdaLoraConfig(**EVERY_FIELD)
    default = AdaLoraConfig()
    assert all(getattr(config, name) != getattr(default, name) for name in default.to_dict())
    save_adapter(adapted(bert(), [3], **EVERY_FIELD), tmp_path)
    assert adapter_config(load_adapter(bert(), tmp_path)) == config


def test_the_base_model_is_named_by_the_caller_or_by_itself(tmp_path: Path) -> None:
    model = adapted(bert(), target_modules=["query"])
    model.config._name_or_path = "some/bert"
    names = []
    for given in (None, "other/bert"):
        save_adapter(model, tmp_path, base_model_name_or_path=given, task_type="SEQ_CLS")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        names.append(config["base_model_name_or_path"])
        assert config["task_type"] == "SEQ_CLS"
    assert names == ["some/bert", "other/bert"]


def test_the_file_is_marked_for_torch_and_holds_our_configuration(tmp_path: Path) -> None:
    save_adapter(adapted(pair()), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    own = json.loads(metadata["adalora"])
    assert own["config"] == AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8.0).to_dict()


def test_saving_logs_the_reload_check(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "adalora"):
        save_adapter(adapted(pair()), tmp_path)
    assert caplog.messages == [f"reload check of {tmp_path}: max difference 0.0e+00"]


# --- warnings -------------------------------------------------------------------------------------------


def test_saving_says_that_the_allocator_never_ran(tmp_path: Path) -> None:
    model = inject(pair(), AdaLoraConfig(init_r=4, target_r=2))
    with pytest.warns(AdaLoraWarning, match="rank allocator has never run") as caught:
        save_adapter(model, tmp_path)
    assert [Path(warning.filename).name for warning in caught] == ["test_checkpoint.py"]


def test_saving_says_that_the_budget_is_not_met(tmp_path: Path) -> None:
    model = inject(pair(), AdaLoraConfig(init_r=4, target_r=1, tinit=2, tfinal=5))
    allocator = train(model, 2)
    with pytest.warns(AdaLoraWarning, match=r"holds 8 triplets, its budget is 2.*finalize\(\)"):
        save_adapter(model, tmp_path)
    allocator.finalize()
    save_adapter(model, tmp_path)


def test_saving_says_what_trains_but_is_not_stored(tmp_path: Path) -> None:
    model = adapted(bert(), target_modules=["query"])
    model.classifier.requires_grad_(True)
    with pytest.warns(AdaLoraWarning, match=r"classifier\.weight, classifier\.bias; .*modules_to_save"):
        save_adapter(model, tmp_path)


def test_a_checkpoint_during_training_may_ask_for_no_warning(tmp_path: Path) -> None:
    model = inject(pair(), AdaLoraConfig(init_r=4, target_r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save_adapter(model, tmp_path, warn=False) == 0.0


# --- models that cannot take it -------------------------------------------------------------------------


def test_a_model_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(bert(), target_modules=["query"]), tmp_path)
    with torch.device("meta"):
        model = bert()
    types = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(AdapterFileError, match=r"query\.weight' of the model is on the meta device"):
        load_adapter(model, tmp_path)
    assert {name: type(module) for name, module in model.named_modules()} == types


@pytest.mark.parametrize("own", [["first"], ["second"]])
def test_a_model_that_has_an_adapter_is_refused_until_ejected(tmp_path: Path, own: list[str]) -> None:
    save_adapter(adapted(pair(), target_modules=["first"]), tmp_path)
    model = adapted(pair(), target_modules=own)
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="adapted already"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    eject(model)
    assert [name for name, _ in named_adapters(load_adapter(model, tmp_path))] == ["first"]


def test_a_layer_that_would_ignore_the_increment_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(pair(), target_modules=["first"]), tmp_path)
    model = pair()
    nn.utils.parametrizations.orthogonal(model.first)
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=r"'first' .*parametrization"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_half_precision_base_keeps_an_adapter_of_full_precision(tmp_path: Path) -> None:
    model = adapted(bert().to(torch.bfloat16), target_modules=["query"])
    save_adapter(model, tmp_path)
    loaded = load_adapter(bert().to(torch.bfloat16), tmp_path)
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float32}
    assert_same(live_factors(loaded), live_factors(model))
    assert logits(loaded).dtype == torch.bfloat16


def test_a_finished_adapter_trains_on_for_a_run_of_another_length(tmp_path: Path) -> None:
    choices = {"tinit": 2, "tfinal": 8, "deltaT": 1, "total_step": 20, "min_rank": 2}
    save_adapter(adapted(pair(), ranks=[1, 3], **choices), tmp_path / "a")
    model = load_adapter(pair(), tmp_path / "a", trainable=True)
    config = model.adalora_config
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (0.1, 0.4, 0.05, None)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
    allocator = RankAllocator(model, total_step=100).attach(optimizer)
    assert (allocator.schedule.tinit, allocator.schedule.freeze_step) == (10, 60)
    assert allocator.minimum == [1, 2]  # never more than is left
    for _ in range(100):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.frozen and allocator.live == 4


def test_a_file_that_reads_back_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adalora import checkpoint

    original = checkpoint.read_adapter

    def damaged(folder: Path) -> object:
        stored = original(folder)
        A, E, B = stored.factors["first"]
        stored.factors["first"] = (A, E + 1e-3, B)
        return stored

    monkeypatch.setattr(checkpoint, "read_adapter", damaged)
    with pytest.raises(AdapterFileError, match="differs from the one written by"):
        save_adapter(adapted(pair()), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_valid_training_settings_of_peft_are_kept(tmp_path: Path) -> None:
    save_adapter(adapted(pair(), total_step=40), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})  # as PEFT: no metadata
    values = json.loads(path.read_text())
    values |= {"beta1": 0.6, "beta2": 0.7, "orth_reg_weight": 0.5, "tinit": 5, "tfinal": 50, "deltaT": 10}
    path.write_text(json.dumps(values | {"total_step": 100}))
    config = load_adapter(pair(), tmp_path / "a").adalora_config
    assert (config.beta1, config.beta2, config.orth_reg_weight) == (0.6, 0.7, 0.5)
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (5, 50, 10, 100)
    path.write_text(json.dumps(values | {"total_step": 3}))
    config = load_adapter(pair(), tmp_path / "a").adalora_config
    assert (config.beta1, config.tinit, config.total_step) == (0.6, 0.1, None)
