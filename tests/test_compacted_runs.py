"""Runs that shed their pruned triplets: they train on, stop, resume and save like any other."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adalora
from adalora.errors import TrainingError
from adalora.injection import named_adapters
from tiny import bert

F64 = torch.float64
STEPS, FREEZE, TARGET, START = 24, 16, 6, 16
CONFIG = adalora.AdaLoraConfig(init_r=8, target_r=3, tinit=2, tfinal=STEPS - FREEZE, deltaT=2, lora_alpha=8)


def net(config: adalora.AdaLoraConfig = CONFIG, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    return adalora.inject(model, config)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.02)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, compact: bool = True) -> adalora.RankAllocator:
    return adalora.RankAllocator(model, STEPS, compact=compact).attach(optimizer)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator, dtype=F64)
        y = torch.randn(8, 4, generator=generator, dtype=F64)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def live(model: nn.Module) -> dict[str, Tensor]:
    """Factors of the live triplets by module."""
    found = {}
    for name, m in named_adapters(model):
        keep = m.lora_keep
        found[f"{name}.A"], found[f"{name}.E"], found[f"{name}.B"] = m.lora_A[keep], m.lora_E[keep], m.lora_B[:, keep]
    return {name: value.detach().clone() for name, value in found.items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    return max(float((one[name] - other[name]).abs().max()) for name in one if one[name].numel())


@pytest.fixture
def whole() -> dict[str, Tensor]:
    """The adapter after an uninterrupted run that compacts."""
    model = net()
    optimizer = adamw(model)
    attach(model, optimizer)
    train(model, optimizer, 0, STEPS)
    return live(model)


def test_everything_shrinks_when_the_pattern_is_final() -> None:
    model = net()
    optimizer = adamw(model)
    allocator = attach(model, optimizer)
    train(model, optimizer, 0, FREEZE)
    assert [m.capacity for _, m in named_adapters(model)] == [8, 8]
    train(model, optimizer, FREEZE, FREEZE + 1)
    assert sum(m.capacity for _, m in named_adapters(model)) == TARGET == allocator.live
    sizes = {p.numel() for p in adalora.adapter_parameters(model)}
    assert {v.numel() for s in optimizer.state.values() for k, v in s.items() if k.startswith("exp")} <= sizes
    assert not any("adalora" in key for state in optimizer.state.values() for key in state)
    train(model, optimizer, FREEZE + 1, STEPS)
    assert (allocator.step, allocator.live, allocator.frozen) == (STEPS, TARGET, True)


def test_without_regularizer_it_is_the_masked_run() -> None:
    """Design D4: the norm of dead rows is all that the regularizer would change."""
    runs = []
    for compact in (False, True):
        model = net(adalora.AdaLoraConfig(**CONFIG.to_dict() | {"orth_reg_weight": 0.0}))
        optimizer = adamw(model)
        attach(model, optimizer, compact)
        train(model, optimizer, 0, STEPS)
        runs.append(live(model))
    assert largest_difference(*runs) <= 1e-13


def test_with_regularizer_the_difference_begins_after_the_freeze() -> None:
    runs: list[list[dict[str, Tensor]]] = [[], []]
    for compact in (False, True):
        model = net()
        optimizer = adamw(model)
        attach(model, optimizer, compact)
        for step in range(STEPS):
            train(model, optimizer, step, step + 1)
            runs[compact].append(live(model))
    differences = [largest_difference(*pair) for pair in zip(*runs, strict=True)]
    assert max(differences[: FREEZE + 1]) == 0.0
    assert 0 < differences[-1] < 0.2


@pytest.mark.parametrize("stop", [1, 7, FREEZE, FREEZE + 1, FREEZE + 4, STEPS - 1])
def test_resume_is_bit_exact_before_at_and_after_compaction(stop: int, whole: dict[str, Tensor]) -> None:
    model = net()
    optimizer = adamw(model)
    attach(model, optimizer)
    train(model, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)

    model = net(seed=1)
    model.load_state_dict(stored["model"])
    optimizer = adamw(model)
    allocator = attach(model, optimizer)
    optimizer.load_state_dict(stored["optimizer"])
    assert allocator.step == stop
    train(model, optimizer, stop, STEPS)
    assert largest_difference(live(model), whole) == 0.0
    assert allocator.live == TARGET


def test_an_optimizer_of_the_parameters_before_loading_is_refused() -> None:
    model = net()
    optimizer = adamw(model)
    attach(model, optimizer)
    train(model, optimizer, 0, STEPS)
    stored = model.state_dict()
    other = net(seed=1)
    stale = adamw(other)
    allocator = adalora.RankAllocator(other, STEPS).attach(stale)
    other.load_state_dict(stored)
    with pytest.raises(TrainingError, match=r"'0' has other parameters than when the allocator was attached"):
        train(other, stale, 0, 1)
    with pytest.raises(TrainingError, match=r"0\.lora_A is not in the optimizer"):
        allocator.attach(stale)


def test_a_compacted_adapter_without_its_optimizer_state_does_not_start_over() -> None:
    model = net()
    optimizer = adamw(model)
    attach(model, optimizer)
    train(model, optimizer, 0, STEPS)
    other = net(seed=1)
    other.load_state_dict(model.state_dict())
    fresh = adamw(other)
    attach(other, fresh)
    with pytest.raises(TrainingError, match="load the optimizer's state too"):
        train(other, fresh, 0, 1)


def test_states_of_another_rank_are_not_taken_for_compacted_ones() -> None:
    larger = net(adalora.AdaLoraConfig(**CONFIG.to_dict() | {"init_r": 9}))
    smaller = net(adalora.AdaLoraConfig(**CONFIG.to_dict() | {"init_r": 7}))
    for other in (larger, smaller):
        with pytest.raises(RuntimeError, match=r"size mismatch for 0\.lora_A"):
            net().load_state_dict(other.state_dict())


def test_a_whole_state_makes_a_compacted_model_whole_again() -> None:
    """As where the best checkpoint of a run is one from before the freeze: the final pattern is applied to it."""
    model = net()
    optimizer = adamw(model)
    allocator = attach(model, optimizer)
    train(model, optimizer, 0, 9)
    early = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, optimizer, 9, STEPS)
    model.load_state_dict(early)
    assert [m.capacity for _, m in named_adapters(model)] == [8, 8]
    allocator.finalize()
    assert sum(int(m.lora_E.count_nonzero()) for _, m in named_adapters(model)) == allocator.live == TARGET


def test_a_compacted_adapter_saves_what_a_masked_one_saves(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    model = net()
    optimizer = adamw(model)
    allocator = attach(model, optimizer, compact=False)
    train(model, optimizer, 0, FREEZE + 1)
    adalora.save_adapter(model, tmp_path / "masked")
    x = torch.randn(5, 6, dtype=F64)
    before = model(x).detach()
    allocator.compact()
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-14, atol=1e-14)
    assert adalora.save_adapter(model, tmp_path / "compacted") == 0.0
    torch.manual_seed(0)
    base = [nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double() for _ in range(2)]
    base[1].load_state_dict(base[0].state_dict())
    read = [adalora.load_adapter(b, tmp_path / name)(x) for b, name in zip(base, ("masked", "compacted"), strict=True)]
    assert torch.equal(*read)


def test_compaction_waits_for_the_final_pattern_and_has_no_way_back() -> None:
    model = net()
    optimizer = adamw(model)
    allocator = attach(model, optimizer, compact=False)
    train(model, optimizer, 0, 3)
    with pytest.raises(TrainingError, match=r"final after step 16 only, and this is step 3"):
        allocator.compact()
    allocator.finalize()
    allocator.compact()
    assert sum(m.capacity for _, m in named_adapters(model)) == TARGET
    with pytest.raises(TrainingError, match="the pruned triplets were freed"):
        allocator.restart()
    train(model, optimizer, 3, 6)
    assert allocator.live == TARGET


def test_a_module_of_rank_zero_calls_nothing_and_the_rest_trains_on() -> None:
    """One of two modules has every triplet of the budget."""
    config = adalora.AdaLoraConfig(**CONFIG.to_dict() | {"max_rank": {"0": 6, "2": 8}, "min_rank": {"0": 6}})
    model = net(config)
    optimizer = adamw(model)
    allocator = attach(model, optimizer)
    train(model, optimizer, 0, STEPS)
    empty = model[2]
    assert (empty.capacity, empty.rank, model[0].rank) == (0, 0, 6)
    x = torch.randn(3, 10, dtype=F64, requires_grad=True)
    assert torch.equal(empty(x), nn.functional.linear(x, empty.weight, empty.bias))
    assert empty(x).grad_fn.name() == "AddmmBackward0"
    assert allocator.step == STEPS


def test_a_budget_of_nothing_leaves_nothing_and_the_run_ends() -> None:
    model = net(adalora.AdaLoraConfig(**CONFIG.to_dict() | {"target_r": 0}))
    model[0].bias.requires_grad_()
    optimizer = adamw(model)
    allocator = attach(model, optimizer)
    train(model, optimizer, 0, STEPS)
    assert [m.capacity for _, m in named_adapters(model)] == [0, 0]
    assert (allocator.step, allocator.live) == (STEPS, 0)


def test_a_state_of_few_triplets_is_not_taken_for_a_compacted_one() -> None:
    """Its sizes would fit the budget, but not its scaling."""
    small = net(adalora.AdaLoraConfig(**CONFIG.to_dict() | {"init_r": 3}))
    model = net()
    before = live(model)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.lora_A"):
        model.load_state_dict(small.state_dict())
    assert largest_difference(live(model), before) == 0.0
    compacted = net()
    optimizer = adamw(compacted)
    attach(compacted, optimizer)
    train(compacted, optimizer, 0, STEPS)
    louder = net(adalora.AdaLoraConfig(**CONFIG.to_dict() | {"lora_alpha": 9}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        louder.load_state_dict(compacted.state_dict())


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_a_part_of_a_compacted_state_changes_no_size(missing: str) -> None:
    model = net()
    optimizer = adamw(model)
    attach(model, optimizer)
    train(model, optimizer, 0, STEPS)
    part = {key: value for key, value in model.state_dict().items() if missing not in key}
    other = net(seed=1)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.lora_E"):
        other.load_state_dict(part, strict=False)
    assert [m.capacity for _, m in named_adapters(other)] == [8, 8]


def test_several_processes_do_not_change_sizes_by_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = adamw(model)
    attach(model, optimizer)
    train(model, optimizer, 0, STEPS)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(TrainingError, match="DistributedDataParallel would not keep equal"):
        net(seed=1).load_state_dict(model.state_dict())


def test_nothing_of_importance_is_held_where_nothing_asks_for_it() -> None:
    """After the freeze, after compaction, after loading a frozen run; and never by magnitude."""
    model = net()
    optimizer = adamw(model)
    allocator = attach(model, optimizer)
    train(model, optimizer, 0, 3)
    assert len(allocator._attachment.averages._shelves) == 1
    train(model, optimizer, 3, STEPS)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, STEPS, STEPS + 1)
    assert allocator._attachment.averages._shelves == []
    magnitude = net(adalora.AdaLoraConfig(**CONFIG.to_dict() | {"importance": "magnitude"}))
    optimizer = adamw(magnitude)
    allocator = attach(magnitude, optimizer, compact=False)
    train(magnitude, optimizer, 0, 5)
    assert allocator._attachment.averages._shelves == []


@pytest.mark.parametrize("attached_first", [True, False])
def test_a_model_converted_after_attaching_trains_like_one_converted_before(attached_first: bool) -> None:
    model = net()
    optimizer = adamw(model)
    if attached_first:
        model.float()
        allocator = attach(model, optimizer)
        model.double()
    else:
        model.float().double()
        allocator = attach(model, optimizer)
    train(model, optimizer, 0, 5)
    assert allocator.step == 5
    assert {v.dtype for s in optimizer.state.values() for k, v in s.items() if "adalora" in k} == {F64}


def test_starting_over_measures_importance_anew() -> None:
    model = net()
    optimizer = adamw(model)
    allocator = attach(model, optimizer, compact=False)
    train(model, optimizer, 0, 5)
    allocator.restart()
    assert not any("adalora" in key for state in optimizer.state.values() for key in state)
    assert (allocator.step, allocator.live) == (0, START)


@pytest.mark.slow
def test_a_trainer_compacts_and_resumes_on_either_side_of_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from adalora.integrations.transformers import AdaLoraCallback

    config = adalora.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=4, deltaT=1)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(0, 40, (6,), generator=generator), "labels": index % 2} for index in range(20)]

    def run(folder: Path, resume: str | None = None, **more: Any) -> Trainer:
        arguments = TrainingArguments(
            str(folder),
            max_steps=10,
            per_device_train_batch_size=2,
            save_steps=1,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **more,
        )
        trainer = Trainer(bert(), arguments, train_dataset=rows, callbacks=[AdaLoraCallback(config, compact=True)])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first = run(tmp_path / "a")
    wanted = live(first.model)
    capacity = sum(m.capacity for _, m in named_adapters(first.model))
    assert capacity == 2 * len(list(named_adapters(first.model)))
    for step in (3, 6, 7, 9):
        again = run(tmp_path / f"b{step}", str(tmp_path / "a" / f"checkpoint-{step}"), save_strategy="no")
        assert largest_difference(live(again.model), wanted) == 0.0, step
