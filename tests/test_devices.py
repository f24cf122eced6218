"""A model over several devices in one process: `device_map`, pipelines of one process.

This machine has one device. FakeTensorMode has as many as one names: its tensors hold no numbers, but an operation on
tensors of two devices raises as it would there.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import adalora
from adalora.config import Importance
from adalora.injection import named_adapters
from adalora.verdicts import Verdicts

DEVICES = ("cpu:1", "cpu:2", "cpu:3")


class Spread(nn.Module):
    """Three matrices of two shapes on three devices, and a fourth beside the first."""

    def __init__(self) -> None:
        super().__init__()
        places = [*DEVICES, DEVICES[0]]
        self.layers = nn.ModuleList(nn.Linear(6, 6 - i % 2, device=place) for i, place in enumerate(places))


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # What a tensor without numbers cannot answer: whether it is finite, and how many of its entries are true.
    monkeypatch.setattr(Verdicts, "ask", lambda self, answer, if_not: None)
    for name in ("_foreach_add_", "_foreach_mul"):
        monkeypatch.setattr(torch, name, _minding_devices(getattr(torch, name)))
    with FakeTensorMode():
        yield


def _minding_devices(operation: Any) -> Any:
    """Of lists, fakes see no device. `_foreach_copy_` may cross."""

    def checked(ours: list[Tensor], others: list[Tensor]) -> Any:
        assert [one.device for one in ours] == [other.device for other in others]
        return operation(ours, others)

    return checked


def test_the_fakes_do_mind_devices() -> None:
    with pytest.raises(RuntimeError, match="found at least two devices, cpu:1 and cpu:2"):
        torch.ones(2, device="cpu:1") + torch.ones(2, device="cpu:2")


# With the squared penalty goes the refactoring, which turns the averages of every metric; the norm knows of none.
@pytest.mark.parametrize(
    "importance,form",
    [
        ("sensitivity*uncertainty", "squared"),
        pytest.param("sensitivity*uncertainty", "norm", marks=pytest.mark.slow),
        ("fisher", "norm"),
        *(
            pytest.param(name, form, marks=pytest.mark.slow)
            for name, form in (("fisher", "squared"), ("magnitude", "squared"), ("magnitude", "norm"))
        ),
    ],
)
def test_a_run_mixes_no_devices(importance: Importance, form: Any) -> None:
    """Two groups of steps: allocations with costs and minima, and the final phase."""
    choices: dict[str, Any] = {"budget": "params", "min_rank": 1, "cost_exponent": 1.0, "refactor": form == "squared"}
    config = adalora.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, importance=importance, orth_reg_form=form, **choices
    )
    model = adalora.inject(Spread(), config)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.1, foreach=False, fused=False)
    allocator = adalora.RankAllocator(model, total_step=6).attach(optimizer)
    heard: list[dict[str, Tensor]] = []
    allocator.on_allocate.append(lambda step, budget, keeps: heard.append(dict(keeps)))
    for _ in range(6):
        for parameter in adalora.adapter_parameters(model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert len(heard) == 3 and allocator.frozen
    for name, module in named_adapters(model):
        assert heard[-1][name].shape == module.lora_keep.shape == (4,)
        assert module.lora_E.device == module.lora_keep.device == module.weight.device


def test_the_reported_penalty_mixes_no_devices() -> None:
    """A Trainer's log asks for it in every model that device_map spread."""
    model = adalora.inject(Spread(), adalora.AdaLoraConfig())
    assert adalora.orthogonality_penalty(model).shape == ()


@pytest.mark.parametrize("place", DEVICES)
def test_the_averages_stand_beside_their_parameters(place: str) -> None:
    model = adalora.inject(Spread(), adalora.AdaLoraConfig(init_r=4, target_r=2))
    optimizer = torch.optim.SGD(adalora.adapter_parameters(model), lr=0.1)
    adalora.RankAllocator(model, total_step=20).attach(optimizer)
    for parameter in adalora.adapter_parameters(model):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for module in model.layers:
        if module.weight.device == torch.device(place):
            state = optimizer.state[module.lora_B]
            assert {value.device for value in state.values()} == {torch.device(place)}
