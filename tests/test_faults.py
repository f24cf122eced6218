"""Faults put in on purpose: each is a clear error or is gone on from exactly, with what was there before kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adalora
from adalora.averages import SENSITIVITY
from adalora.errors import AdapterFileError, InjectionError, TrainingError
from adalora.files import write_files
from adalora.injection import named_adapters
from tiny import adapted, assert_unchanged, pair, snapshot

STEPS = 24
CONFIG = adalora.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=4, tinit=4, tfinal=8, deltaT=2)
MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "plain": lambda model: torch.optim.AdamW(adalora.adapter_parameters(model), lr=1e-2, foreach=False),
    "fused": lambda model: torch.optim.AdamW(adalora.adapter_parameters(model), lr=1e-2, fused=True),
}


def batch(step: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step))


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, factor: float = 1.0) -> None:
    ((model(batch(step)) - batch(step)[:, :4]).square().mean() * factor).backward()
    optimizer.step()
    optimizer.zero_grad()


def begun(make: Callable[[nn.Module], torch.optim.Optimizer] = MAKERS["plain"]) -> tuple[nn.Module, object, object]:
    model = adalora.inject(pair(), CONFIG)
    optimizer = make(model)
    return model, optimizer, adalora.RankAllocator(model, STEPS).attach(optimizer)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("at", [2, 9, 18], ids=["warm-up", "reduction", "final phase"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_run_guarded_against_bad_gradients_is_the_run_without_that_batch(kind: str, at: int, poison: float) -> None:
    """The guard every loop can have: step only if all gradients are finite. Nothing of the batch is left anywhere."""
    model, optimizer, allocator = begun(MAKERS[kind])
    wanted, other, _ = begun(MAKERS[kind])
    for step in range(STEPS + 1):
        if step != at:
            step_once(wanted, other, step)
        (model(batch(step)) - batch(step)[:, :4]).square().mean().backward()
        if step == at:
            model.second.lora_B.grad[0, 0] = poison
        if all(p.grad.isfinite().all() for p in adalora.adapter_parameters(model) if p.grad is not None):
            optimizer.step()
        optimizer.zero_grad()
    assert allocator.step == STEPS
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), wanted.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("factor", [1e4, 1e12])
def test_a_spike_of_the_loss_leaves_the_averages_finite_and_the_budget_exact(factor: float) -> None:
    model, optimizer, allocator = begun()
    seen: list[int] = []
    allocator.on_allocate.append(
        lambda step, budget, keep: seen.append(budget - sum(int(k.sum()) for k in keep.values()))
    )
    for step in range(STEPS):
        step_once(model, optimizer, step, factor if step == 7 else 1.0)
        for held in optimizer.state.values():
            assert all(bool(value.isfinite().all()) for value in held.values())
    assert seen and set(seen) == {0}
    assert allocator.live == 4


def test_a_spike_beyond_all_numbers_is_an_error_and_the_last_checkpoint_goes_on(tmp_path: Path) -> None:
    model, optimizer, _ = begun()
    for step in range(7):
        step_once(model, optimizer, step)
    held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    write_files(tmp_path, {"state.pt": lambda path: torch.save(held, path)})
    with pytest.raises(TrainingError, match=r"not finite: the run has diverged\. Lower the learning rate, or clip"):
        step_once(model, optimizer, 7, 1e30)
        step_once(model, optimizer, 8)
    held = torch.load(tmp_path / "state.pt", weights_only=True)
    again, fresh, after = begun()
    again.load_state_dict(held["model"])
    fresh.load_state_dict(held["optimizer"])
    for step in range(7, STEPS):
        step_once(again, fresh, step)
    wanted, other, _ = begun()
    for step in range(STEPS):
        step_once(wanted, other, step)
    assert after.live == 4
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), wanted.state_dict().values(), strict=True)
    )


class Twice(nn.Module):
    """One module in two places, and a second one tied to the weight of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.second = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.second(self.again(self.first(x).tanh())).tanh())


def test_shared_and_tied_modules_train_save_and_load_with_a_budget_for_each_matrix_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adalora.inject(Twice(), CONFIG)
    assert [name for name, _ in named_adapters(model)] == ["first", "second", "tied"]
    optimizer = MAKERS["plain"](model)
    allocator = adalora.RankAllocator(model, STEPS).attach(optimizer)
    for step in range(STEPS):
        (model(batch(step)) - batch(step).flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.live == 3 * CONFIG.target_r
    assert model.second.weight is model.tied.weight and model.first is model.again
    adalora.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    loaded = adalora.load_adapter(Twice(), tmp_path)
    with torch.no_grad():
        assert float((loaded(batch(0)) - model(batch(0))).abs().max()) <= 1e-6
    state = snapshot(model)
    with pytest.raises(InjectionError):  # one weight would get two increments
        adalora.merge(model)
    assert_unchanged(model, state)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that every user can look into, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_folder_that_may_only_be_read_is_refused_and_stays_as_it_was(open_folder: Path) -> None:
    """As a user without rights, in a process of its own: for root every folder can be written."""
    folder = open_folder / "out"
    adalora.save_adapter(adapted(pair(), [1]), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.chmod(0o555)
    model = adapted(pair(), [2])
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                adalora.save_adapter(model, folder)
            except AdapterFileError as error:
                os._exit(0 if "Permission denied" in str(error) and "choose another folder" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    folder.chmod(0o755)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_numbers_of_another_type_are_taken_as_the_numbers_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    adalora.save_adapter(adapted(pair()), tmp_path)
    tensors = {key: value.to(dtype) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = adalora.load_adapter(pair(), tmp_path)
    for name, module in named_adapters(model):
        assert module.lora_A.dtype == torch.float32
        assert torch.equal(module.lora_A.to(dtype), tensors[f"base_model.model.{name}.lora_A"])


@pytest.mark.parametrize("parent", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("parents_step_has_hooks", [False, True])
def test_an_optimizer_whose_step_calls_its_parents_counts_each_step_once(
    parent: type[torch.optim.Optimizer], parents_step_has_hooks: bool
) -> None:
    """torch runs hooks at both levels once a plain optimizer of the parent's class was made in the process."""

    class Base(parent):  # type: ignore[misc, valid-type]
        def step(self, closure: object = None) -> None:
            super().step(closure)

    class Outer(Base):
        def step(self, closure: object = None) -> None:
            super().step(closure)

    parent([nn.Parameter(torch.zeros(1))], lr=0.1)
    if parents_step_has_hooks:
        Base([nn.Parameter(torch.zeros(1))], lr=0.1)
    wanted, other, _ = begun(lambda model: parent(adalora.adapter_parameters(model), lr=0.05))
    model, optimizer, allocator = begun(lambda model: Outer(adalora.adapter_parameters(model), lr=0.05))
    for step in range(STEPS):
        step_once(wanted, other, step)
        step_once(model, optimizer, step)
        assert allocator.step == step + 1
    assert allocator.live == 4
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), wanted.state_dict().values(), strict=True)
    )


def test_an_optimizer_that_fails_in_its_update_leaves_averages_and_step_of_the_step_before() -> None:
    class Failing(torch.optim.SGD):
        broken = False

        def step(self, closure: object = None) -> None:
            if self.broken:
                raise RuntimeError("device lost")
            super().step()

    model, optimizer, allocator = begun(lambda model: Failing(adalora.adapter_parameters(model), lr=0.1))
    for step in range(6):
        step_once(model, optimizer, step)
    before = snapshot(model), {p: s[SENSITIVITY].clone() for p, s in optimizer.state.items()}
    Failing.broken = True
    with pytest.raises(RuntimeError, match="device lost"):
        step_once(model, optimizer, 6)
    assert allocator.step == 6
    assert_unchanged(model, before[0])
    assert all(torch.equal(s[SENSITIVITY], before[1][p]) for p, s in optimizer.state.items())
    Failing.broken = False
    for step in range(6, STEPS):
        step_once(model, optimizer, step)
    assert (allocator.step, allocator.live) == (STEPS, 4)
