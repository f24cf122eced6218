"""A run stopped in any phase, also between two micro-batches, and gone on with by Accelerate or by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adalora
from adalora.errors import TrainingError
from adalora.injection import named_adapters
from tiny import pair

STEPS, MICRO = 24, 2
CONFIG = adalora.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=4, tinit=5, tfinal=9, deltaT=2)
PLACES = {"before the first step": 0, "warm-up": 3, "reduction": 9, "freeze": 14, "final phase": 15, "last step": 23}


def batch(place: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(place))


def loss(model: nn.Module, place: int) -> Tensor:
    return (model(batch(place)) - batch(place)[:, :4].roll(1)).square().mean()


def state(model: nn.Module) -> list[Tensor]:
    values = [value.detach().clone() for value in model.state_dict().values()]
    return values + [module.lora_keep.clone() for _, module in named_adapters(model)]


def prepared(folder: Path | None, compact: bool) -> tuple[Any, Any, Any, Any]:
    """Model, optimizer, scheduler and accelerator; of the checkpoint in `folder`, if there is one.

    The weights are loaded before the optimizer is built: after compaction the parameters are others.
    """
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    torch.manual_seed(1 if folder is None else 2)
    model = adalora.inject(pair(), CONFIG)
    if folder is not None:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=3e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    model, optimizer, rate = accelerator.prepare(model, optimizer, rate)
    if folder is not None:
        accelerator.load_state(str(folder))
    adalora.RankAllocator(model, STEPS, compact=compact).attach(optimizer)
    return model, optimizer, rate, accelerator


def run(parts: Any, begin: int, save_at: dict[int, Path], end: int = STEPS * MICRO) -> list[float]:
    model, optimizer, rate, accelerator = parts
    losses = []
    for place in range(begin * MICRO, end):
        if place % MICRO == 0 and place // MICRO in save_at:
            accelerator.save_state(str(save_at[place // MICRO]))
        with accelerator.accumulate(model):
            one = loss(model, place)
            accelerator.backward(one)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        losses.append(one.item())
    return losses


@pytest.mark.parametrize("compact", [pytest.param(False, marks=pytest.mark.slow), True])
def test_accelerate_goes_on_bit_by_bit_from_every_phase(tmp_path: Path, compact: bool) -> None:
    folders = {step: tmp_path / name for name, step in PLACES.items()}
    whole = prepared(None, compact)
    losses = run(whole, 0, folders)
    assert sum(module.capacity for _, module in named_adapters(whole[0])) == (4 if compact else 8)
    for name, step in PLACES.items():
        again = prepared(tmp_path / name, compact)
        # Killed between two micro-batches of the next step: what it gathered is lost, and gathered again.
        lost = run(again, step, {}, end=step * MICRO + 1) if step < STEPS - 1 else []
        again = prepared(tmp_path / name, compact)
        assert run(again, step, {}) == losses[step * MICRO :], name
        assert not lost or lost == losses[step * MICRO : step * MICRO + 1]
        assert all(torch.equal(a, b) for a, b in zip(state(again[0]), state(whole[0]), strict=True)), name
        for one, other in zip(
            again[1].state_dict()["state"].values(), whole[1].state_dict()["state"].values(), strict=True
        ):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def test_weights_of_another_size_behind_the_optimizer_are_an_error(tmp_path: Path) -> None:
    """The order that Accelerate's own examples have, which cannot work once parameters have shrunk."""
    run(prepared(None, compact=True), 0, {20: tmp_path / "compacted"})
    accelerator = accelerate.Accelerator(cpu=True)
    model = adalora.inject(pair(), CONFIG)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=3e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.load_state(str(tmp_path / "compacted"))
    with pytest.raises(TrainingError, match=r"first\.lora_A is not in the optimizer; build it"):
        adalora.RankAllocator(model, STEPS, compact=True).attach(optimizer)


def test_a_compacted_adapter_is_stored_and_trains_on_from_its_real_ranks(tmp_path: Path) -> None:
    model, optimizer, _, accelerator = parts = prepared(None, compact=True)
    run(parts, 0, {})
    ranks = {name: module.capacity for name, module in named_adapters(model)}
    assert sum(ranks.values()) == 4
    adalora.save_adapter(model, tmp_path / "adapter")
    again = adalora.load_adapter(pair(), tmp_path / "adapter", trainable=True)
    assert {name: module.capacity for name, module in named_adapters(again)} == ranks
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(again), lr=1e-2)
    allocator = adalora.RankAllocator(again, 30, compact=True).attach(optimizer)
    assert allocator.schedule.initial_budget == allocator.schedule.target_budget == 4
    for place in range(30):
        loss(again, place).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.live == 4 and all(bool(module.lora_E.all()) for _, module in named_adapters(again))
    assert accelerator.sync_gradients
