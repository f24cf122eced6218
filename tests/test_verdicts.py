"""No step waits for the device: shown on a pretended one, whose numbers cannot be read at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import adalora
from adalora.verdicts import Verdicts

CONFIG = adalora.AdaLoraConfig(
    init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, min_rank={"0": 1}, target_modules=["0", "1"]
)


def run(steps: int) -> tuple[adalora.RankAllocator, int]:
    """A run on a device that is not there; and the number of questions that it asked on the way."""
    asked: list[Tensor] = []

    def ask(self: Verdicts, answer: Tensor, if_not: Callable[[], None]) -> None:
        assert answer.device.type == "cuda"
        asked.append(answer)

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(Verdicts, "ask", ask)
        for name in ("normal_", "uniform_", "kaiming_uniform_"):  # no such device has random numbers
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        model = adalora.inject(nn.Sequential(nn.Linear(5, 6, device="cuda"), nn.Linear(6, 3, device="cuda")), CONFIG)
        optimizer = torch.optim.SGD(adalora.adapter_parameters(model), lr=0.1)
        allocator = adalora.RankAllocator(model, total_step=8).attach(optimizer)
        for _ in range(steps):
            for parameter in adalora.adapter_parameters(model):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
    return allocator, len(asked)


def test_no_step_of_a_whole_run_reads_a_number_from_the_device() -> None:
    allocator, questions = run(8)
    assert (allocator.step, allocator.frozen) == (8, True)
    assert questions == 6 + 5  # steps 0 to 5 update the averages, steps 2 to 6 allocate


def test_the_pretended_device_would_notice() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones((), device="cuda") > 0)


def test_on_a_cpu_the_answer_is_heard_at_once() -> None:
    heard: list[Any] = []
    verdicts = Verdicts()
    verdicts.ask(torch.tensor(True), lambda: heard.append("yes"))
    assert heard == []
    verdicts.ask(torch.tensor(False), lambda: heard.append("no"))
    assert heard == ["no"]
    verdicts.hear(wait=True)
    assert heard == ["no"]
