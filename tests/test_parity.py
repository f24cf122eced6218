"""Parity with PEFT's AdaLoRA: the same weights, losses and steps give the same parameters and masks.

Ours is the preset "paper", so that these tests are about the paper's method whatever the defaults are.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import adalora
from adalora.injection import named_adapters

STEPS = 40
SCHEDULE: dict[str, Any] = {"init_r": 6, "target_r": 3, "tinit": 4, "tfinal": 8, "deltaT": 3, "total_step": STEPS}
SETTINGS: dict[str, Any] = SCHEDULE | {"lora_alpha": 16, "beta1": 0.8, "beta2": 0.9, "orth_reg_weight": 0.2}


def with_peft(model: nn.Module, targets: list[str], **settings: Any) -> Any:
    with warnings.catch_warnings():
        # Two of PEFT's own: it asks transformers for an old name, and corrects its own default for GPT-2.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        return peft.get_peft_model(model, peft.AdaLoraConfig(target_modules=targets, **SETTINGS | settings))


def their_modules(model: Any) -> dict[str, Any]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.adalora.AdaLoraLayer)
    }


def copy_weights(ours: nn.Module, theirs: Any) -> None:
    """PEFT draws A and B from N(0, 0.02²) too, but in its own order."""
    modules = their_modules(theirs)
    mine = dict(named_adapters(ours))
    assert list(mine) == list(modules)
    with torch.no_grad():
        for name, module in mine.items():
            for part in ("lora_A", "lora_E", "lora_B"):
                getattr(module, part).copy_(getattr(modules[name], part)["default"])


def compare(ours: nn.Module, theirs: Any, tolerance: float) -> None:
    for name, module in named_adapters(ours):
        for part in ("lora_A", "lora_E", "lora_B"):
            mine = getattr(module, part).detach()
            other = getattr(their_modules(theirs)[name], part)["default"].detach()
            difference = float((mine - other).norm() / other.norm().clamp_min(1e-3))
            assert difference <= tolerance, (name, part, difference)
            if part == "lora_E":
                assert torch.equal(mine == 0, other == 0), name


def run_both(
    base: nn.Module,
    targets: list[str],
    loss_of: Callable[[nn.Module, int], Tensor],
    tolerance: float,
    penalty_is_in_loss: bool,
    **settings: Any,
) -> list[int]:
    """Train both, compare after every step, and return the live triplets after each."""
    theirs = with_peft(copy.deepcopy(base), targets, **settings)
    config = adalora.AdaLoraConfig.preset("paper", target_modules=targets, **SETTINGS | settings)
    ours = adalora.inject(base, config)
    copy_weights(ours, theirs)
    extra = [p for p in theirs.parameters() if p.requires_grad]
    their_optimizer = torch.optim.AdamW(extra, lr=0.01, weight_decay=0.01)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(ours), lr=0.01, weight_decay=0.01)
    allocator, live = adalora.RankAllocator(ours).attach(optimizer), []
    for step in range(STEPS):
        their_optimizer.zero_grad()
        # Only the tuner's own forward adds the penalty; PeftModel's goes around it.
        loss = loss_of(theirs.base_model, step)
        if not penalty_is_in_loss:
            loss = loss + theirs.peft_config["default"].orth_reg_weight * their_penalty(theirs)
        loss.backward()
        their_optimizer.step()
        theirs.base_model.update_and_allocate(step)

        optimizer.zero_grad()
        loss_of(ours, step).backward()
        optimizer.step()
        compare(ours, theirs, tolerance)
        live.append(sum(int((module.lora_E != 0).sum()) for _, module in named_adapters(ours)))
    pattern = theirs.peft_config["default"].rank_pattern
    for name, module in named_adapters(ours):
        assert module.lora_keep.tolist() == pattern[f"{name}.lora_E.default"], name
    assert allocator.live == live[-1]
    return live


def their_penalty(model: Any) -> Tensor:
    """As PEFT's forward computes it where the model's output has a loss."""
    terms = []
    for module in their_modules(model).values():
        A, B = module.lora_A["default"], module.lora_B["default"]
        terms += [torch.norm(gram - torch.eye(len(gram), dtype=gram.dtype)) for gram in (A @ A.T, B.T @ B)]
    return torch.stack(terms).mean()


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)  # PEFT creates its parameters in the default dtype
    yield
    torch.set_default_dtype(torch.float32)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))


@pytest.mark.parametrize(
    "settings",
    [{}, {"deltaT": 1, "tinit": 0, "tfinal": 1}, {"deltaT": 10, "tfinal": 20}, {"target_r": 1, "orth_reg_weight": 0.0}],
)
def test_mlp_equals_peft_in_fp32(settings: dict[str, Any]) -> None:
    x, y = torch.randn(STEPS, 16, 12), torch.randint(5, (STEPS, 16))
    live = run_both(
        mlp(), ["0", "2", "4"], lambda m, t: nn.functional.cross_entropy(m(x[t]), y[t]), 1e-5, False, **settings
    )
    assert live[-1] == 3 * settings.get("target_r", 3)


@pytest.mark.usefixtures("double_by_default")
def test_mlp_equals_peft_in_fp64() -> None:
    x, y = torch.randn(STEPS, 16, 12), torch.randint(5, (STEPS, 16))
    live = run_both(mlp(), ["0", "2", "4"], lambda m, t: nn.functional.cross_entropy(m(x[t]), y[t]), 1e-7, False)
    assert live[-1] == 9


def test_convolutions_equal_peft() -> None:
    base = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 3, stride=2), nn.Flatten())
    x, y = torch.randn(STEPS, 8, 3, 7, 7), torch.randint(36, (STEPS, 8))
    live = run_both(base, ["0", "2"], lambda m, t: nn.functional.cross_entropy(m(x[t]), y[t]), 1e-5, False)
    assert live[-1] == 6


def batches(vocabulary: int) -> dict[str, Tensor]:
    mask = torch.ones(STEPS, 4, 10, dtype=torch.long)
    mask[:, 1, 6:] = 0
    return {
        "input_ids": torch.randint(1, vocabulary, (STEPS, 4, 10)),
        "attention_mask": mask,
        "labels": torch.randint(3, (STEPS, 4)),
    }


@pytest.mark.slow
def test_bert_equals_peft_with_its_penalty_inside_the_loss() -> None:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    base = transformers.BertForSequenceClassification(config).train()
    data = batches(50)
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    live = run_both(base, targets, lambda m, t: m(**{k: v[t] for k, v in data.items()}).loss, 1e-5, True)
    assert live[-1] == 36
    assert live[8] == 72  # back between two allocations, as in PEFT


def test_gpt2_conv1d_equals_peft() -> None:
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    base = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(50, (STEPS, 4, 10))
    live = run_both(base, ["c_attn", "c_fc"], lambda m, t: m(input_ids=ids[t], labels=ids[t]).loss, 1e-5, True)
    assert live[-1] == 12
