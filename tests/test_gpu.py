"""What a CUDA device could change: device of state and masks, autocast with a GradScaler, fused optimizers.

Run with `pytest -m gpu` where there is one.
"""

from pathlib import Path

import pytest
import torch

import adalora
from adalora.averages import SENSITIVITY
from tiny import bert

pytestmark = pytest.mark.gpu

CONFIG = adalora.AdaLoraConfig(init_r=4, target_r=2, modules_to_save=["classifier"], exclude_modules=r".*pooler\.dense")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_run_on_the_device_meets_its_budget_and_moves_to_the_cpu(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = adalora.inject(bert().cuda(), CONFIG)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=1e-2, fused=True)
    allocator = adalora.RankAllocator(model, total_step=30).attach(optimizer)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    ids = torch.randint(0, 40, (8, 12), device="cuda")
    for _ in range(30):
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(input_ids=ids, labels=ids[:, 0] % 2).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    allocator.finalize()
    assert allocator.live == allocator.schedule.target_budget
    state = optimizer.state[next(iter(allocator.modules.values())).lora_A][SENSITIVITY]
    assert state.is_cuda and state.dtype is torch.float32 and state.max() > 0
    adalora.save_adapter(model, tmp_path / "a")
    other = adalora.load_adapter(bert(), tmp_path / "a").eval()
    with torch.no_grad():
        live, read = model.eval()(input_ids=ids).logits.cpu(), other(input_ids=ids.cpu()).logits
    torch.testing.assert_close(live, read, rtol=1e-4, atol=1e-4)


def test_no_step_waits_for_the_device() -> None:
    """Warm-up, allocation, freeze and final phase; torch itself raises where the host would wait."""
    model = adalora.inject(bert().cuda(), CONFIG)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=1e-2, fused=True)
    adalora.RankAllocator(model, total_step=12).attach(optimizer)
    ids = torch.randint(0, 40, (8, 12), device="cuda")
    for _ in range(12):
        model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()


def test_a_gradient_that_is_not_finite_is_counted_without_waiting() -> None:
    model = adalora.inject(bert().cuda(), CONFIG)
    optimizer = torch.optim.SGD(adalora.adapter_parameters(model), lr=0.0)
    allocator = adalora.RankAllocator(model, total_step=12).attach(optimizer)
    for parameter in adalora.adapter_parameters(model):
        parameter.grad = torch.full_like(parameter, torch.inf)
    with torch.no_grad():
        for module in allocator.modules.values():
            module.lora_E.fill_(1.0)
    optimizer.step()
    assert allocator.skipped_steps == 1
