"""Leaving AdaLoRA: LoRA folders that PEFT loads to the same outputs, and merged weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from adalora import (
    AdaLoraConfig,
    AdaLoraWarning,
    disabled,
    export_lora,
    export_merged,
    inject,
    merge,
    unmerge,
)
from adalora.errors import AdapterFileError, InjectionError
from adalora.injection import named_adapters
from tiny import TOKENS, Net, adapted, assert_unchanged, bert, gpt2, net, pair, peft_warnings, relative, snapshot

PREFIX = "base_model.model."


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def peft_load(model: Any, folder: Path) -> Any:
    with peft_warnings():
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def lora_layers(model: nn.Module) -> dict[str, Any]:
    kind = peft.tuners.lora.layer.LoraLayer
    return {name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, kind)}


CASES = {
    "linear": (bert, {"target_modules": ["query", "value", "output.dense"], "modules_to_save": ["classifier"]}),
    "all-linear": (bert, {"exclude_modules": ["classifier"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "conv1d and linear": (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
    "bias all": (bert, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "bias lora_only": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "embedding": (net, {"target_modules": ["embed", "linear"]}),
    "convolutions": (net, {"target_modules": ["conv", "line", "linear", "embed"]}),
    "grouped": (net, {"target_modules": ["grouped", "linear"]}),
    "everything": (net, {"target_modules": ["embed", "conv", "grouped", "line", "linear", "head"], "bias": "all"}),
}
RANKS = [2, 0, 4, 1, 3, 0]


@pytest.mark.parametrize("padded", [False, True, 8])
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_from_the_export(tmp_path: Path, case: str, padded: bool | int) -> None:
    build, choices = CASES[case]
    model = adapted(build(), RANKS, target_r=3, **choices)
    assert export_lora(model, tmp_path / "a", padded=padded) <= 1e-6
    loaded = peft_load(build(), tmp_path / "a")
    assert relative(logits(loaded), logits(model)) <= 1e-6
    with disabled(model):
        assert relative(logits(model), logits(loaded)) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_each_module_has_its_own_rank_and_scale_one(tmp_path: Path, case: str) -> None:
    build, choices = CASES[case]
    model = adapted(build(), RANKS, target_r=3, **choices)
    export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {name: module.rank * getattr(module, "groups", 1) for name, module in named_adapters(model)}
    live = {name: rank for name, rank in ranks.items() if rank}
    assert 0 < len(live) < len(ranks)
    assert sorted(config["target_modules"]) == sorted(live)
    assert config["r"] == config["lora_alpha"] == max(live.values())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert all(key.startswith("^") for key in config["rank_pattern"])
    layers = lora_layers(peft_load(build(), tmp_path))
    assert {name: layer.r["default"] for name, layer in layers.items()} == live
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}


@pytest.mark.parametrize(("padded", "rank"), [(True, 4), (4, 4), (8, 8)])
def test_padded_has_one_rank_and_no_patterns(tmp_path: Path, padded: bool | int, rank: int) -> None:
    model = adapted(bert(), RANKS, target_r=3, target_modules=["query", "key", "value"])
    export_lora(model, tmp_path, padded=padded)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (rank, rank, {}, {})
    assert len(config["target_modules"]) == 6  # those of rank 0 too: some readers want every module of a kind
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.shape[0] for key, value in tensors.items() if "lora_A" in key} == {rank}
    assert {value.shape[1] for key, value in tensors.items() if "lora_B" in key} == {rank}


def test_the_increments_are_those_of_the_adapter_in_double_precision(tmp_path: Path) -> None:
    model = adapted(bert(), [2, 4], target_r=3, target_modules=["query", "dense"])
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, module in named_adapters(model):
        A, B = (tensors[f"{PREFIX}{name}.lora_{part}.weight"].double() for part in "AB")
        E = module.lora_E.detach().double()
        wanted = module.scaling * module.lora_B.detach().double() @ (E * module.lora_A.detach().double())
        assert relative(B @ A, wanted) <= 1e-6


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({"q": nn.Linear(5, 5)})
        self.x = nn.ModuleDict({"layer": nn.ModuleDict({"q": nn.Linear(5, 5)})})

    def forward(self, x: Tensor) -> Tensor:
        return self.x["layer"]["q"](self.layer["q"](x).tanh())


@pytest.mark.parametrize("ranks", [[1, 3], [3, 1], [2, 0], [0, 2]])
def test_a_name_that_is_the_ending_of_another_keeps_its_own_rank(tmp_path: Path, ranks: list[int]) -> None:
    torch.manual_seed(0)
    model, base = Nested(), Nested()
    base.load_state_dict(model.state_dict())
    adapted(model, ranks, target_modules=["q"])
    export_lora(model, tmp_path)
    loaded = peft_load(base, tmp_path)
    live = {name: rank for name, rank in zip(["layer.q", "x.layer.q"], ranks, strict=True) if rank}
    assert {name: layer.r["default"] for name, layer in lora_layers(loaded).items()} == live
    x = torch.randn(3, 5)
    assert relative(loaded(x), model(x)) <= 1e-6


def test_a_padded_rank_below_the_largest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="padded=3 is below the largest rank, 4"):
        export_lora(adapted(pair(), [4, 1], target_r=3), tmp_path / "a", padded=3)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("padded", [False, True, 4])
def test_an_adapter_without_a_live_triplet_is_refused(tmp_path: Path, padded: bool | int) -> None:
    with pytest.raises(AdapterFileError, match="no triplet of this adapter is live"):
        export_lora(adapted(pair(), [0], target_r=0), tmp_path / "a", padded=padded)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("dilation=(2, 2)", nn.Conv2d(1, 8, 3, padding=2, dilation=2)),
        ("padding_mode='circular'", nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular")),
    ],
)
def test_a_convolution_that_lora_cannot_express_is_refused(tmp_path: Path, name: str, layer: nn.Module) -> None:
    model = net()
    model.conv = copy.deepcopy(layer)
    adapted(model, [2, 1], target_modules=["conv", "linear"])
    with pytest.raises(AdapterFileError, match="'conv'") as caught:
        export_lora(model, tmp_path / "a")
    assert name in str(caught.value)
    assert "export_merged" in str(caught.value)
    assert not (tmp_path / "a").exists()
    wanted = model(TOKENS)
    assert export_merged(model, tmp_path / "a") <= 1e-6
    base = net()
    base.conv = copy.deepcopy(layer)
    load_model(base, tmp_path / "a" / "model.safetensors")
    assert relative(base(TOKENS), wanted) <= 1e-6


@pytest.mark.parametrize("export", [export_lora, export_merged])
def test_exporting_says_that_the_allocator_never_ran(tmp_path: Path, export: Any) -> None:
    model = inject(pair(), AdaLoraConfig(init_r=4, target_r=2))
    with torch.no_grad():
        model.first.lora_E.fill_(1)
    with pytest.warns(AdaLoraWarning, match="rank allocator has never run"):
        export(model, tmp_path)


@pytest.mark.parametrize("export", [export_lora, export_merged])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, export: Any) -> None:
    model = adapted(pair())
    with torch.no_grad():
        model.first.lora_E[-1] = float("nan")
    with pytest.raises(AdapterFileError, match=r"nothing was written: .*first.* not finite"):
        export(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- merged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["linear", "all-linear", "conv1d", "bias all"])
def test_merged_weights_of_a_transformers_model_load_without_us(tmp_path: Path, case: str) -> None:
    build, choices = CASES[case]
    model = adapted(build(), RANKS, target_r=3, **choices)
    before, wanted = snapshot(model), logits(model)
    assert export_merged(model, tmp_path) <= 1e-6
    assert_unchanged(model, before)
    loaded = type(build()).from_pretrained(tmp_path).eval()
    assert {type(module).__name__ for module in loaded.modules() if "SVD" in type(module).__name__} == set()
    assert relative(logits(loaded), wanted) <= 1e-6
    assert torch.equal(logits(model), wanted)


def test_merged_weights_of_any_module_load_into_its_class(tmp_path: Path) -> None:
    model = adapted(net(), RANKS, target_r=3, target_modules=["embed", "conv", "grouped", "line", "linear"])
    before, wanted = snapshot(model), model(TOKENS)
    assert export_merged(model, tmp_path) <= 1e-6
    assert_unchanged(model, before)
    loaded = Net().eval()
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert relative(loaded(TOKENS), wanted) <= 1e-6


def test_the_difference_of_a_bf16_base_is_its_rounding(tmp_path: Path) -> None:
    """Half a unit in the last of 8 bits, of weights that are larger than the increment: percents, not an error."""
    model = adapted(bert().to(torch.bfloat16), [2], target_modules=["query"])
    with torch.no_grad():
        weight = max(float((m.weight.float() + m.delta_weight()).abs().max()) for _, m in named_adapters(model))
        delta = max(float(m.delta_weight().abs().max()) for _, m in named_adapters(model))
    difference = export_merged(model, tmp_path)
    assert 1e-4 < difference <= weight * 2**-8 / delta
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_a_tied_weight_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    model = adapted(gpt2(), [2], target_modules=["c_attn", "wte"])
    assert model.lm_head.weight is model.transformer.wte.weight
    before = snapshot(model)
    with pytest.raises(InjectionError, match=r"'transformer.wte'.* tied"):
        export_merged(model, tmp_path / "a")
    assert_unchanged(model, before)
    assert not (tmp_path / "a").exists()


def test_a_tied_weight_elsewhere_stays_tied(tmp_path: Path) -> None:
    model = adapted(gpt2(), [2], target_modules=["c_attn"])
    export_merged(model, tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    other = pair()
    other.again = nn.Linear(6, 5)
    other.again.weight = other.first.weight
    export_merged(adapted(other, [2], target_modules=["second"]), tmp_path / "plain")
    assert sorted(load_file(tmp_path / "plain" / "model.safetensors")) == [
        "again.bias",
        "first.bias",
        "first.weight",
        "second.bias",
        "second.weight",
    ]


def test_an_instance_that_saves_only_its_adapter_is_still_exported_whole(tmp_path: Path) -> None:
    model = adapted(bert(), [2], target_modules=["query"])

    def narrowed(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the class's own save_pretrained belongs here")

    model.save_pretrained = narrowed
    model._keys_to_ignore_on_save = ["bert.embeddings.word_embeddings.weight"]
    export_merged(model, tmp_path)
    assert model.save_pretrained is narrowed
    assert model._keys_to_ignore_on_save == ["bert.embeddings.word_embeddings.weight"]
    wanted = logits(model)
    del model.save_pretrained
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert relative(logits(loaded), wanted) <= 1e-6


def test_a_merged_model_is_refused_until_unmerged(tmp_path: Path) -> None:
    model = adapted(pair())
    merge(model)
    with pytest.raises(InjectionError, match=r"adalora\.unmerge"):
        export_merged(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    unmerge(model)
    assert export_merged(model, tmp_path / "a") <= 1e-6


def test_other_weights_in_the_folder_that_would_be_loaded_instead_are_refused(tmp_path: Path) -> None:
    model = adapted(bert(), [2], target_modules=["query"])
    export_merged(model, tmp_path)
    export_merged(model, tmp_path)
    stale = tmp_path / "model-00001-of-00002.safetensors"
    stale.write_bytes((tmp_path / "model.safetensors").read_bytes())
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(AdapterFileError, match=r"model-00001-of-00002\.safetensors"):
        export_merged(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_lora_that_reads_back_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adalora import export

    original = export.load_file
    monkeypatch.setattr(export, "load_file", lambda path: {k: v * 1.001 for k, v in original(path).items()})
    with pytest.raises(AdapterFileError, match="differs by"):
        export_lora(adapted(pair()), tmp_path / "a")
    assert not (tmp_path / "a").exists()
