"""`adalora squeeze`: any LoRA of PEFT's, cut to a budget, is what PEFT then loads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from adalora import cli
from adalora.commands.inspecting import inspect_facts
from adalora.commands.squeezing import cut, read_lora
from adalora.errors import AdapterFileError

Shell = Callable[..., str]
TARGETS = ["query", "value", "intermediate.dense"]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    def call(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["adalora", "squeeze", *map(str, arguments)])
        capsys.readouterr()
        assert cli.run_app() == code
        screen = capsys.readouterr()
        return " ".join((screen.err if code else screen.out).split())

    return call


def lora(folder: Path, **choices: Any) -> peft.PeftModel:
    """A LoRA that looks trained, stored in `folder`."""
    given = {"r": 4, "lora_alpha": 10, "target_modules": TARGETS, "modules_to_save": ["classifier"]} | choices
    with tiny.peft_warnings():
        model = peft.get_peft_model(tiny.bert(), peft.LoraConfig(**given))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * (3.0 if ".0." in name else 0.5))
        model.save_pretrained(str(folder))
    return model.eval()


def read(folder: Path) -> peft.PeftModel:
    with tiny.peft_warnings():
        return peft.PeftModel.from_pretrained(tiny.bert(), str(folder)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.TOKENS).logits


def increments(model: Any) -> dict[str, Tensor]:
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def size(folder: Path) -> int:
    tensors = load_file(folder / "adapter_model.safetensors")
    return sum(value.numel() for key, value in tensors.items() if ".lora_" in key)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"query": 6, "layer.1.attention.self.value": 2}, "alpha_pattern": {"query": 3}},
        {"target_modules": "all-linear", "modules_to_save": None, "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "all-linear"],
)
def test_a_lora_of_any_form_computes_the_same_where_nothing_is_cut(
    choices: dict[str, Any], tmp_path: Path, shell: Shell
) -> None:
    model = lora(tmp_path / "whole", **choices)
    whole = size(tmp_path / "whole")
    text = shell(tmp_path / "whole", "--parameters", whole, "--out", tmp_path / "same")
    assert "100.00% of the increments' squared norm" in text
    # A rank above a matrix's smaller side says nothing.
    assert size(tmp_path / "same") == whole - (2 * (2 + 16) if "all-linear" in choices.values() else 0)
    assert tiny.relative(logits(read(tmp_path / "same")), logits(model)) < 1e-5


def test_each_matrix_becomes_its_best_approximation_within_the_budget(tmp_path: Path, shell: Shell) -> None:
    model = lora(tmp_path / "whole", rank_pattern={"query": 6}, alpha_pattern={"value": 40})
    text = shell(tmp_path / "whole", "--target-r", "1", "--out", tmp_path / "small")
    before, after = increments(model), increments(read(tmp_path / "small"))
    unit = sum(sum(value.shape) for value in before.values())
    assert unit - max(sum(v.shape) for v in before.values()) < size(tmp_path / "small") <= unit
    assert 0 < len(after) < len(before)  # weak matrices are not adapted any more
    kept = total = 0.0
    for name, value in before.items():
        sigma = torch.linalg.svdvals(value)
        rank = int(torch.linalg.matrix_rank(after[name], rtol=1e-4)) if name in after else 0
        difference = value - after.get(name, torch.zeros_like(value))
        assert abs(difference.norm() - sigma[rank:].norm()) < 1e-5 * value.norm()  # Eckart and Young
        kept, total = kept + float(sigma[:rank].square().sum()), total + float(sigma.square().sum())
    assert f"{kept / total:.2%} of the" in text
    # The head that trained comes along.
    heads = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "small")]
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0] if "classifier" in key)


def test_factors_are_balanced_and_the_scale_is_that_of_before(tmp_path: Path) -> None:
    lora(tmp_path / "whole")
    whole = read_lora(tmp_path / "whole")
    small, _ = cut(whole, whole.size // 2, density=True)
    for name, (A, B, scale) in small.factors.items():
        assert scale == whole.factors[name][2] == 2.5
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-5)


def test_weighing_what_a_direction_costs_keeps_more_of_the_norm_in_the_same_budget(tmp_path: Path) -> None:
    lora(tmp_path / "whole")
    whole = read_lora(tmp_path / "whole")
    shares = [cut(whole, whole.size // 3, density)[1] for density in (True, False)]
    assert shares[0] >= shares[1]


@pytest.mark.parametrize(
    "choices,message",
    [
        ({"use_dora": True}, "has use_dora: its increments are more than B·A"),
        ({"lora_bias": True}, "has lora_bias"),
        ({"bias": "lora_only"}, "has bias='lora_only'"),
        ({"target_modules": ["word_embeddings"]}, "belongs to no linear layer"),
    ],
)
def test_what_is_no_plain_lora_is_refused(choices: dict[str, Any], message: str, tmp_path: Path, shell: Shell) -> None:
    lora(tmp_path / "whole", **choices)
    assert message in shell(tmp_path / "whole", "--target-r", "1", "--out", tmp_path / "small", code=2)
    assert not (tmp_path / "small").exists()


def test_mistakes_are_told(tmp_path: Path, shell: Shell) -> None:
    lora(tmp_path / "whole")
    out = ("--out", tmp_path / "small")
    assert "as --target-r R or as --parameters N" in shell(tmp_path / "whole", *out, code=2)
    assert "does not lie between one rank" in shell(tmp_path / "whole", "--target-r", "99", *out, code=2)
    assert "does not lie between one rank" in shell(tmp_path / "whole", "--parameters", "3", *out, code=2)
    config = tmp_path / "whole" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa"}))
    assert "init_lora_weights='pissa'" in shell(tmp_path / "whole", "--target-r", "1", *out, code=2)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "ADALORA"}))
    assert "adalora export" in shell(tmp_path / "whole", "--target-r", "1", *out, code=2)
    (tmp_path / "whole" / "adapter_model.safetensors").write_bytes(b"torn")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LORA", "init_lora_weights": True}))
    assert "cannot read" in shell(tmp_path / "whole", "--target-r", "1", *out, code=2)


def test_a_lora_that_no_training_leaves_is_refused_by_its_matrix(tmp_path: Path) -> None:
    lora(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(file)
    key = next(key for key in tensors if key.endswith("query.lora_A.weight"))
    for value in (torch.full_like(tensors[key], torch.nan), torch.full_like(tensors[key], 1e30), tensors[key][:2]):
        save_file(tensors | {key: value.contiguous()}, file)
        with pytest.raises(AdapterFileError, match="query"):
            read_lora(tmp_path)
    save_file(tensors, file)
    for change in ({"lora_alpha": 0}, {"lora_alpha": "x"}, {"lora_alpha": -3}, {"alpha_pattern": {"(": 1}}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(AdapterFileError, match="Restore"):
            read_lora(tmp_path)
    del config["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="lora_alpha"):
        read_lora(tmp_path)
    save_file({name: value for name, value in tensors.items() if name != key.replace("lora_A", "lora_B")}, file)
    with pytest.raises(AdapterFileError, match=r"without 'bert.*query\.lora_B\.weight'"):
        inspect_facts(tmp_path)
