"""init_lora_weights="lora": the first step is LoRA's own."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora import AdaLoraConfig, RankAllocator, inject
from adalora.errors import TrainingError
from adalora.injection import adapter_config, named_adapters, training_progress
from adalora.start import activation_start_


def line() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 9))


def test_with_lambda_fixed_training_is_that_of_lora() -> None:
    """λ = 1 all along: P and Q are then LoRA's B and A, and end where PEFT's LoRA ends."""
    x, y = torch.randn(64, 12), torch.randn(64, 9)
    ours = inject(
        line(), AdaLoraConfig(init_r=4, target_r=4, lora_alpha=8.0, init_lora_weights="lora", orth_reg_weight=0)
    )
    theirs = get_peft_model(line(), LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    [(_, module)] = named_adapters(ours)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(module.lora_A)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x), line()(x))
    for model in (ours, theirs):
        trained = [p for name, p in model.named_parameters() if p.requires_grad and "lora_E" not in name]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    assert layer.lora_B["default"].weight.abs().max() > 0.05
    # init_r + 1e-5 in the authors' scale
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_the_start_has_the_spread_of_lora_and_its_scale() -> None:
    torch.manual_seed(0)
    model = inject(
        nn.Sequential(nn.Linear(768, 512)),
        AdaLoraConfig(init_r=8, target_r=4, lora_alpha=None, init_lora_weights="lora"),
    )
    [(_, module)] = named_adapters(model)
    assert not module.delta_weight().any() and not module.lora_B.any()
    assert bool((module.lora_E == 1).all())
    assert float(module.lora_A.detach().abs().max()) <= 768**-0.5
    assert float(module.lora_A.detach().norm(dim=1).mean()) == pytest.approx(math.sqrt(1 / 3), rel=0.03)
    assert module.scaling == pytest.approx(8 / math.sqrt(4), rel=1e-3)
    assert adapter_config(model).lora_alpha == 32.0


@pytest.mark.parametrize("importance", ["fisher", "sensitivity*uncertainty", "sensitivity", "magnitude"])
def test_triplets_are_pruned_to_the_budget_and_saved(importance: str, tmp_path: object) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=1, lora_alpha=None, init_lora_weights="lora",
        importance=importance, orth_reg_weight=0,
    )  # fmt: skip
    inject(model, config)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=1e-2)
    RankAllocator(model, total_step=20).attach(optimizer)
    x, y = torch.randn(64, 12), torch.randn(64, 4)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert sum(module.rank for _, module in named_adapters(model)) == 4
    assert adalora.save_adapter(model, f"{tmp_path}/adapter") == 0


def test_a_start_is_loaded_as_untrained_and_a_trained_state_with_its_pattern() -> None:
    """Λ is 1 at the start, so that neither "not zero" nor "not 1" alone says which triplets a state keeps."""
    config = AdaLoraConfig(init_r=4, target_r=4, init_lora_weights="lora", lora_alpha=8.0)
    state = inject(line(), config).state_dict()
    fresh = inject(line(), config)
    fresh.load_state_dict(state)
    [(_, module)] = named_adapters(fresh)
    assert module.rank == 4 and training_progress(fresh).steps == 0
    state["0.lora_E"] = torch.tensor([[1.0], [0.0], [0.7], [1.0]])
    fresh.load_state_dict(state)
    assert module.lora_keep.tolist() == [True, False, True, True] and training_progress(fresh).steps is None


def test_a_start_from_data_is_refused_by_its_reason() -> None:
    model = inject(line(), AdaLoraConfig(init_r=2, target_r=2, init_lora_weights="lora", lora_alpha=8.0))
    with pytest.raises(TrainingError, match=r"Λ of '0' is not zero.*another init_lora_weights"):
        activation_start_(model, [torch.randn(5, 12)], lambda model, x: model(x))
