"""What is compared. Every arm has the same model, modules, batch and optimizer; only the method differs.

Stage "budget": the budget falls and every step allocates (deltaT = 1), rank 12 on all sides. Stage "compacted":
the pattern is final and its dead triplets are gone, 12 → 4 on average, against a LoRA of rank 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import adalora
from benchmarks.models import Batch, Shape

INIT, TARGET, COMPACT = 12, 8, 4  # ranks: of every arm at the start, of the schedule, after compaction
ALPHA = 16
FREEZE = 4  # first step of the final phase in the compacted arms
HORIZON = 10_000  # steps that a schedule spans: no measurement outlasts it

FLOOR, LORA, PEFT_ADALORA, OURS, EVEN = "frozen floor", "PEFT LoRA", "PEFT AdaLoRA", "adalora", "adalora, even"
FISHER = "adalora, fisher"


@dataclass(frozen=True)
class Setting:
    """What all arms of a cell share. `dropout` is the adapters' own; `update` picks AdamW's implementation."""

    shape: Shape
    dropout: float = 0.0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    update: str = "fused"  # as transformers.Trainer has it

    def build(self) -> nn.Module:
        """The base model. With 16 bits it alone is cast: both libraries keep adapters in fp32."""
        return self.shape.build().to(self.device, self.dtype)

    def adamw(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        """The optimizer of every arm: torch's choice of implementation, or foreach or fused by name."""
        chosen: dict[str, Any] = {} if self.update == "default" else {self.update: True}
        return torch.optim.AdamW(parameters, lr=1e-4, **chosen)


@dataclass
class Arm:
    """A model under one method. `after_step` is the call that PEFT's AdaLoRA needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    after_step: Callable[[], object] = lambda: None

    def loss(self, batch: Batch) -> Tensor:
        """The forward pass."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def step(self, batch: Batch) -> None:
        """Forward, backward, update, and whatever the method does besides."""
        self.loss(batch).backward()
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad()


Builder = Callable[[Setting], Arm]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def empty(model: nn.Module) -> int:
    """Matrices that compaction left without any triplet."""
    named = model.named_parameters()
    return sum(name.endswith(".lora_E") and not parameter.numel() for name, parameter in named)


def frozen_floor(setting: Setting) -> Arm:
    """Only biases (or norms) train: the cost that no adapter can go below, but for gradients of inputs."""
    model = setting.build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(setting.shape.floor))
    return Arm(model, setting.adamw(trained(model)))


def peft_lora(setting: Setting, rank: int = INIT) -> Arm:
    """PEFT's LoRA."""
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA, lora_dropout=setting.dropout, target_modules=list(setting.shape.targets)
    )
    model = _peft(setting, config)
    return Arm(model, setting.adamw(trained(model)))


def peft_adalora(setting: Setting) -> Arm:
    """PEFT's AdaLoRA, with the call that it needs after each step."""
    config = PeftAdaLoraConfig(
        init_r=INIT,
        target_r=TARGET,
        tinit=0,
        tfinal=1,
        deltaT=1,
        total_step=HORIZON,
        orth_reg_weight=0.1,
        lora_alpha=ALPHA,
        lora_dropout=setting.dropout,
        target_modules=list(setting.shape.targets),
    )
    model = _peft(setting, config)
    steps = iter(range(1, HORIZON))
    return Arm(model, setting.adamw(trained(model)), lambda: model.update_and_allocate(next(steps)))


def ours(setting: Setting) -> Arm:
    """This package, with its budget falling."""
    return _ours(setting, target_r=TARGET, tfinal=1)[0]


def ours_by_fisher(setting: Setting) -> Arm:
    """This package with the importance that is read from Λ alone, the budget in parameters, and no regularizer."""
    return _ours(setting, target_r=TARGET, tfinal=1, importance="fisher", budget="params", orth_reg_weight=0)[0]


def ours_compacted(setting: Setting, **choices: Any) -> Arm:
    """This package in its final phase, compacted: a few steps on one sequence freeze the pattern."""
    arm, allocator = _ours(setting, target_r=COMPACT, tfinal=HORIZON - FREEZE, **choices)
    batch = setting.shape.batch(setting.shape.length(64), setting.device)
    for _ in range(FREEZE + 1):
        arm.step(batch)
    assert allocator.frozen
    allocator.compact()
    return arm


BUDGET: dict[str, Builder] = {
    FLOOR: frozen_floor,
    LORA: peft_lora,
    PEFT_ADALORA: peft_adalora,
    OURS: ours,
    FISHER: ours_by_fisher,
}
# Which triplets survive on random weights says nothing of a real task, and matrices left with rank 0 cost
# nothing. So a second arm keeps COMPACT in every matrix and is LoRA's equal, shape by shape.
COMPACTED: dict[str, Builder] = {
    FLOOR: frozen_floor,
    LORA: lambda setting: peft_lora(setting, COMPACT),
    OURS: ours_compacted,
    EVEN: lambda setting: ours_compacted(setting, min_rank=COMPACT),
}
STAGES = {"budget": BUDGET, "compacted": COMPACTED}


def _ours(setting: Setting, **choices: Any) -> tuple[Arm, adalora.RankAllocator]:
    config = adalora.AdaLoraConfig(
        target_modules=setting.shape.targets,
        init_r=INIT,
        tinit=0,
        deltaT=1,
        lora_alpha=ALPHA,
        lora_dropout=setting.dropout,
        **choices,
    )
    model = adalora.inject(setting.build(), config)
    optimizer = setting.adamw(adalora.adapter_parameters(model))
    return Arm(model, optimizer), adalora.RankAllocator(model, total_step=HORIZON).attach(optimizer)


def _peft(setting: Setting, config: LoraConfig) -> Any:
    # The tuner inside PeftModel, which every task type calls: with no task type PeftModel goes past it, and AdaLoRA
    # then loses its regularizer without a word. A task type would train the head as well.
    return get_peft_model(setting.build(), config).base_model
