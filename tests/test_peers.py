"""What users of AdaLoRA met elsewhere, one test for each row: it breaks there, it holds here.

`docs/peers.md` is the table. "There" is PEFT's AdaLoRA, run beside ours wherever that is cheap; the rest of a
test is about ours. All models have four 8 x 8 matrices: 24 triplets at the start, 12 in the end.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import adalora
import processes
from adalora.averages import SENSITIVITY
from adalora.errors import ConfigError
from adalora.injection import named_adapters
from adalora.schedule import Phase, Schedule
from tiny import labelled_rows, trainer_arguments

STEPS = 40
SCHEDULE: dict[str, Any] = {"init_r": 6, "target_r": 3, "lora_alpha": 12, "tinit": 4, "tfinal": 8, "deltaT": 3}
START, TARGET = 24, 12
NAMES = ["one", "two", "three", "four"]


class Toy(nn.Module):
    """Four matrices; returns what transformers' models return: an object with the loss."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(8, 8))

    def body(self, x: Tensor) -> Tensor:
        for name in NAMES:
            x = torch.tanh(getattr(self, name)(x))
        return x

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(x)
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits * 4, labels))


class Spare(Toy):
    """Toy with a matrix that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)


def toy(kind: type[Toy] = Toy) -> Any:
    torch.manual_seed(1)
    return kind()


def ours(base: nn.Module | None = None, **choices: Any) -> Any:
    base = toy() if base is None else base
    torch.manual_seed(2)
    return adalora.inject(base, adalora.AdaLoraConfig(**SCHEDULE | choices))


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Around PEFT's own calls: it asks transformers for an old name, warns wrongly (E7), and of empty tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        warnings.filterwarnings("ignore", "Adapter 'default': .* invalid shape")
        yield


def their_config(names: list[str] = NAMES, **choices: Any) -> Any:
    return peft.AdaLoraConfig(target_modules=list(names), **SCHEDULE | {"total_step": STEPS} | choices)


def theirs(base: nn.Module | None = None, names: list[str] = NAMES, **choices: Any) -> Any:
    base = toy() if base is None else base
    torch.manual_seed(2)
    with peft_warnings():
        return peft.get_peft_model(base, their_config(names, **choices))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=generator)
    return x, x[:, :4].argmax(1)


def adamw(model: nn.Module, **choices: Any) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, **{"lr": 0.02, "weight_decay": 0.01} | choices)


def live_e(model: nn.Module) -> int:
    """Λ that are not zero."""
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


def loss_there(model: Any, step: int) -> Tensor:
    """With their regularizer, which a PeftModel without a task type does not even reach (row D1)."""
    return model.base_model(*batch(step)).loss


def train_theirs(
    model: Any, steps: range | int = STEPS, optimizer: Any = None, poison: int = -1, counts: list[int] | None = None
) -> torch.optim.Optimizer:
    """The loop of PEFT's documentation: allocate after the step, before the gradients go."""
    optimizer = optimizer or adamw(model)
    for step in range(steps) if isinstance(steps, int) else steps:
        loss_there(model, step).backward()
        _poison(model, step == poison)
        optimizer.step() if step != poison else None  # as a GradScaler does
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        counts.append(live_e(model)) if counts is not None else None
    return optimizer


def train_ours(
    model: nn.Module, steps: range | int = STEPS, optimizer: Any = None, poison: int = -1, counts: Any = None
) -> adalora.RankAllocator:
    optimizer = optimizer or adamw(model)
    allocator = adalora.RankAllocator(model, STEPS).attach(optimizer)
    for step in range(steps) if isinstance(steps, int) else steps:
        model(*batch(step)).loss.backward()
        _poison(model, step == poison)
        optimizer.step() if step != poison else None
        optimizer.zero_grad()
        counts.append(live_e(model)) if counts is not None else None
    return allocator


def _poison(model: nn.Module, now: bool) -> None:
    for name, parameter in model.named_parameters() if now else ():
        if "lora_" in name and parameter.grad is not None:
            parameter.grad.fill_(torch.inf)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch(999)[0]).logits


def stored(model: nn.Module, folder: Path, **choices: Any) -> Path:
    adalora.save_adapter(model, folder, **choices)
    return folder


def their_folder(folder: Path, base: nn.Module | None = None, names: list[str] = NAMES, steps: int = STEPS) -> Any:
    """Trained with PEFT and stored by it; returns the model."""
    model = theirs(base, names)
    train_theirs(model, steps)
    with peft_warnings():
        model.save_pretrained(str(folder))
    return model


# --- A: the allocator is not called, called at the wrong place, or lost -------------------------------------


def tiny_bert() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.2,
    )
    return transformers.BertForSequenceClassification(config)


def hf_trainer(model: Any, folder: Path, *callbacks: Any, **choices: Any) -> Any:
    import transformers

    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 4, "logging_strategy": "no"}
    args = transformers.TrainingArguments(**trainer_arguments(folder, **settings | choices))
    return transformers.Trainer(model, args, train_dataset=labelled_rows(32), callbacks=list(callbacks))


def test_A1_trainer_without_manual_call_meets_the_budget(tmp_path: Path) -> None:
    from adalora.integrations.transformers import AdaLoraCallback

    modules = ["query", "key", "value"]
    model = theirs(tiny_bert(), modules)
    hf_trainer(model, tmp_path).train()
    assert live_e(model) == 3 * 6  # every triplet, and nothing was said
    assert model.peft_config["default"].rank_pattern is None

    model = tiny_bert()
    config = adalora.AdaLoraConfig(**SCHEDULE, target_modules=modules)
    hf_trainer(model, tmp_path, AdaLoraCallback(config)).train()
    assert live_e(model) == adalora.rank_report(model).total_rank == 3 * 3


def test_A1_an_allocator_that_never_ran_is_named_when_saving(tmp_path: Path) -> None:
    with pytest.warns(adalora.AdaLoraWarning, match="the rank allocator has never run on this model"):
        adalora.save_adapter(ours(), tmp_path / "adapter")


def test_A2_bare_modules_have_allocator_and_regularizer() -> None:
    bare = peft.inject_adapter_in_model(their_config(), toy())
    assert not hasattr(bare, "update_and_allocate")
    bare(*batch(0)).loss.backward()
    # While E is 0 the task has no gradient here: whatever there is comes from the regularizer.
    assert all(float(p.grad.abs().max()) == 0 for name, p in bare.named_parameters() if "lora_A" in name)

    model = ours()
    assert type(model) is Toy
    optimizer = adamw(model)
    adalora.RankAllocator(model, STEPS).attach(optimizer)
    model(*batch(0)).loss.backward()
    optimizer.step()
    assert all(float(p.grad.abs().max()) > 0 for name, p in model.named_parameters() if "lora_A" in name)
    assert train_ours(ours()).live == TARGET


def test_A3_steps_are_the_optimizers_and_the_report_shows_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    model = theirs()
    model.print_trainable_parameters()
    train_theirs(model)
    model.print_trainable_parameters()
    before, after = capsys.readouterr().out.splitlines()
    assert before == after  # half of the triplets are gone
    model = theirs(total_step=4 * STEPS)  # counted in micro-batches, as the length of a data loader is
    optimizer = adamw(model)
    for step in range(STEPS):
        for part in range(4):
            loss_there(model, 4 * step + part).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert live_e(model) > TARGET

    model = ours()
    whole = adalora.rank_report(model).parameters
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model, STEPS).attach(optimizer)
    for call in range(STEPS * 4):
        model(*batch(call)).loss.backward()
        if call % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert (allocator.step, live_e(model)) == (STEPS, TARGET)
    report = adalora.rank_report(model)
    assert (whole, report.parameters, report.total_rank) == (START * 17, TARGET * 17, TARGET)
    assert f"{TARGET:>4}  {START:>8}" in report.table().splitlines()[-1]


def test_A4_gradients_are_read_before_anyone_clears_them() -> None:
    model = theirs()
    optimizer = adamw(model)
    model(*batch(0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(TypeError, match="NoneType"):
        model.base_model.update_and_allocate(0)  # where a Trainer's on_step_end stands

    ends = []
    for clear_first in (False, True):
        model = ours()
        optimizer = adamw(model)
        adalora.RankAllocator(model, STEPS).attach(optimizer)
        for step in range(STEPS):
            optimizer.zero_grad() if clear_first else None
            model(*batch(step)).loss.backward()
            optimizer.step()
            None if clear_first else optimizer.zero_grad()
        ends.append((live_e(model), adalora.rank_report(model).ranks))
    assert ends[0] == ends[1]
    assert ends[0][0] == TARGET


def test_A5_a_module_without_gradient_is_zero_signal() -> None:
    model = theirs(toy(Spare), [*NAMES, "spare"])
    with pytest.raises(TypeError, match="NoneType"):
        train_theirs(model, 1)

    for weight in (0.0, 0.1):
        model = ours(toy(Spare), orth_reg_weight=weight)
        assert train_ours(model).live == live_e(model) == 15
        assert adalora.rank_report(model).ranks["spare"] == (0 if not weight else model.spare.rank)
        assert model.spare.rank < 3


def test_A5_one_name_inside_another_is_told_apart() -> None:
    model = toy()
    model.ada, model.ada2 = nn.Linear(8, 8), nn.Linear(8, 8)
    adalora.inject(model, adalora.AdaLoraConfig(**SCHEDULE, target_modules=["ada"], modules_to_save=["ada2"]))
    assert [name for name, _ in named_adapters(model)] == ["ada"]


def test_A6_allocation_follows_the_step_and_model_equals_pattern() -> None:
    model = theirs(tfinal=0)
    optimizer = adamw(model)
    for step in range(STEPS):
        model(*batch(step)).loss.backward()
        model.base_model.update_and_allocate(step)  # as its docstring may be read: before the step
        optimizer.step()
        optimizer.zero_grad()
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == TARGET
    assert live_e(model) == START

    model = ours(tfinal=0)
    train_ours(model)
    keeps = {name: module.lora_keep.view(-1, 1) for name, module in named_adapters(model)}
    assert all(torch.equal(module.lora_E != 0, keeps[name]) for name, module in named_adapters(model))
    assert live_e(model) == TARGET


# --- A7, A8, D6, D4: two processes --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two gloo processes report, see `worker`."""
    folder = tmp_path_factory.mktemp("ddp")
    processes.run_script(__file__, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_A7_a_trainer_in_two_processes_meets_the_budget(two_processes: list[dict[str, Any]]) -> None:
    for report in two_processes:
        assert report["calls of an overridden zero_grad"] == 0  # the way of ms-swift: DDP never calls it
        assert report["trainer"] == {"step": STEPS, "live": TARGET, "nonzero": TARGET}
    assert two_processes[0]["trainer ranks"] == two_processes[1]["trainer ranks"]
    assert two_processes[0]["started from"] == two_processes[1]["started from"]  # the same directions from data


@pytest.mark.slow
def test_A8_the_allocator_does_not_mind_the_wrapper(two_processes: list[dict[str, Any]]) -> None:
    for report in two_processes:
        assert "has no attribute 'update_and_allocate'" in report["theirs wrapped"]
        assert report["wrapped"] == {"step": STEPS, "live": TARGET, "nonzero": TARGET}
    assert two_processes[0]["masks"] == two_processes[1]["masks"]
    assert two_processes[0]["sum of parameters"] == two_processes[1]["sum of parameters"]


@pytest.mark.slow
def test_D6_reentrant_checkpointing_in_two_processes(two_processes: list[dict[str, Any]]) -> None:
    for report in two_processes:
        assert "mark a variable ready only once" in report["theirs checkpointed"]
        assert report["checkpointed"] == {"step": STEPS, "live": TARGET, "nonzero": TARGET}


@pytest.mark.slow
def test_D4_the_regularizer_does_not_grow_with_processes(two_processes: list[dict[str, Any]]) -> None:
    alone = penalty_norm(ours(), 1)
    for report in two_processes:
        assert report["penalty gradient"] == pytest.approx(alone, rel=1e-6)


def worker(rank: int, folder: Path) -> None:
    """One of two processes; writes what it saw to <rank>.json."""
    import transformers

    from adalora.integrations.transformers import AdaLoraCallback

    targets = ["query", "key", "value", "attention.output.dense"]
    config = adalora.AdaLoraConfig(**SCHEDULE, target_modules=targets, init_lora_weights="gradient")
    started: list[float] = []

    class Started(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            factors = [f for _, m in named_adapters(kwargs["model"]) for f in (m.lora_A, m.lora_B)]
            started.extend(torch.cat([factor.detach().flatten() for factor in factors]).tolist())

    class Counting(transformers.BertForSequenceClassification):
        calls = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            Counting.calls += 1
            super().zero_grad(set_to_none)

    torch.manual_seed(0)
    model = Counting(tiny_bert().config)
    run = hf_trainer(model, folder, AdaLoraCallback(config), ddp_backend="gloo")
    before = Counting.calls
    run.add_callback(Started())
    run.train()
    [callback] = [c for c in run.callback_handler.callbacks if isinstance(c, AdaLoraCallback)]
    report: dict[str, Any] = {
        "calls of an overridden zero_grad": Counting.calls - before,
        "trainer": _counts(callback.allocator, model),
        "started from": started,
        "trainer ranks": adalora.rank_report(model).ranks,
        "theirs wrapped": _message(lambda: _ddp(theirs()).update_and_allocate(0)),
    }
    model = ours()
    allocator = _train_wrapped(model, rank)
    report["wrapped"] = _counts(allocator, model)
    report["masks"] = [module.lora_keep.tolist() for _, module in named_adapters(model)]
    report["sum of parameters"] = float(torch.cat([p.detach().view(-1) for p in model.parameters()]).double().sum())
    report["penalty gradient"] = penalty_norm(_ddp(ours()), 1)

    checkpointed = ours(toy(Checkpointed))
    report["checkpointed"] = _counts(_train_wrapped(checkpointed, rank), checkpointed)
    broken = _ddp(theirs(toy(Checkpointed)).base_model)
    report["theirs checkpointed"] = _message(lambda: broken(*_inputs(0)).loss.backward())
    (folder / f"{rank}.json").write_text(json.dumps(report))


class Checkpointed(Toy):
    """Recomputes its body in the backward pass, in the reentrant way."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=True)
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits * 4, labels))


def _inputs(step: int) -> tuple[Tensor, Tensor]:
    x, labels = batch(step)
    return x.requires_grad_(), labels


def _ddp(model: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def _train_wrapped(model: nn.Module, rank: int) -> adalora.RankAllocator:
    wrapped, optimizer = _ddp(model), adamw(model)
    allocator = adalora.RankAllocator(wrapped, STEPS).attach(optimizer)
    for step in range(STEPS):
        wrapped(*_inputs(2 * step + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return allocator


def _counts(allocator: Any, model: nn.Module) -> dict[str, int]:
    return {"step": allocator.step, "live": allocator.live, "nonzero": live_e(model)}


def _message(action: Callable[[], Any]) -> str:
    try:
        action()
    except (AttributeError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"


# --- B: schedule --------------------------------------------------------------------------------------------


def test_B1_nothing_to_prune_is_no_crash() -> None:
    with pytest.raises(RuntimeError, match="selected number k out of range"):
        train_theirs(theirs(init_r=3))

    model = ours(init_r=3)
    assert train_ours(model).live == live_e(model) == TARGET
    with pytest.raises(ConfigError, match=r"target_r \(4\) is above init_r \(3\)"):
        adalora.AdaLoraConfig(init_r=3, target_r=4)


def test_B2_phases_fit_any_length_of_run() -> None:
    with pytest.raises(ValueError, match="don't allow for a budgeting phase"):
        their_config(tinit=600, tfinal=1800, total_step=1500)  # the paper's steps, at another batch size

    config = adalora.AdaLoraConfig(tinit=0.2, tfinal=0.5, deltaT=0.01)
    for total in (10, 150, 1500, 100_000):
        schedule = Schedule.from_config(config, START, TARGET, total)
        assert (schedule.tinit, schedule.tfinal) == (total // 5, total // 2)
        assert (schedule.budget(0), schedule.budget(total - 1)) == (START, TARGET)


def test_B3_a_wrong_total_still_ends_on_the_budget_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = theirs(total_step=10 * STEPS)
    train_theirs(model)
    assert live_e(model) == 21

    model = ours()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model, 10 * STEPS).attach(optimizer)
    for step in range(STEPS):
        model(*batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with caplog.at_level(logging.WARNING, logger="adalora"):
        allocator.finalize()
    assert live_e(model) == TARGET
    assert "training stopped after step 40 of 400" in caplog.text


def test_B3_the_trainer_tells_the_total(tmp_path: Path) -> None:
    from adalora.integrations.transformers import AdaLoraCallback

    callback = AdaLoraCallback(adalora.AdaLoraConfig(init_r=6, target_r=3))
    hf_trainer(tiny_bert(), tmp_path, callback, max_steps=-1, num_train_epochs=2).train()
    assert callback.allocator is not None
    assert (callback.allocator.schedule.total_step, callback.allocator.live) == (16, 3 * 7)


@pytest.mark.parametrize("deltaT", [1, 7, 15, 1000])
def test_B4_no_final_phase_meets_the_budget(deltaT: int) -> None:
    if deltaT in (7, 15):
        model = theirs(tfinal=0, deltaT=deltaT)
        train_theirs(model)
        assert live_e(model) == START

    model = ours(tfinal=0, deltaT=deltaT)
    assert train_ours(model).live == live_e(model) == TARGET


def test_B5_tfinal_is_a_duration() -> None:
    for total in (40, 400):
        schedule = Schedule.from_config(adalora.AdaLoraConfig(**SCHEDULE), START, TARGET, total)
        final = [step for step in range(total) if schedule.phase(step) is Phase.FINAL]
        assert final == list(range(total - 8, total))
    assert "tfinal: how long the final pattern trains" in (adalora.AdaLoraConfig.__doc__ or "")
    with pytest.raises(ConfigError, match=r"Both are durations in optimizer steps"):
        Schedule.from_config(adalora.AdaLoraConfig(tinit=4, tfinal=36), START, TARGET, 40)


def test_B6_no_total_is_needed_to_configure_or_to_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not work when `total_step` is None"):
        peft.AdaLoraConfig(target_modules=NAMES)
    model = their_folder(tmp_path / "old")
    file = tmp_path / "old" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"total_step": None}))  # as old versions wrote it
    with peft_warnings(), pytest.raises(ValueError, match="does not work when `total_step` is None"):
        peft.PeftModel.from_pretrained(toy(), str(tmp_path / "old"))

    assert adalora.AdaLoraConfig(target_modules=NAMES).total_step is None
    loaded = adalora.load_adapter(toy(), tmp_path / "old")
    assert float((outputs(loaded) - outputs(model)).abs().max()) <= 1e-6


def test_B7_there_is_no_r() -> None:
    with pytest.warns(UserWarning, match="`r` is not used in AdaLora and will be ignored"):
        their_config(r=4)

    with pytest.raises(TypeError, match="unexpected keyword argument 'r'"):
        adalora.AdaLoraConfig(r=4)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="AdaLoraConfig has no field 'r'"):
        adalora.AdaLoraConfig.from_dict({"r": 4})


@pytest.mark.parametrize("total", [10, 40, 333])
def test_B8_the_defaults_need_no_tuning_of_steps(total: int) -> None:
    schedule = Schedule.from_config(adalora.AdaLoraConfig(), START, TARGET, total)
    reduction = sum(schedule.phase(step) is Phase.REDUCTION for step in range(total))
    assert reduction / total == pytest.approx(0.5, abs=0.11)  # the authors' advice: about half of training
    model = ours(**{"tinit": 0.1, "tfinal": 0.4, "deltaT": 0.005})
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model, total).attach(optimizer)
    for step in range(total):
        model(*batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (allocator.live, live_e(model), allocator.frozen) == (TARGET, TARGET, True)


# --- C: importance and numerics -----------------------------------------------------------------------------


def test_C1_scores_of_a_16_bit_model_do_not_underflow() -> None:
    from peft.tuners.adalora import RankAllocator

    def run(model: Any, allocate: Callable[[int], Any], optimizer: Any) -> None:
        for step in range(STEPS):
            x, labels = batch(step)
            (F.cross_entropy(model(x.half()).logits.float() * 4, labels) * 0.01).backward()
            optimizer.step()
            allocate(step)
            optimizer.zero_grad()

    bare = peft.inject_adapter_in_model(their_config(), toy().half())
    assert next(p for name, p in bare.named_parameters() if "lora_A" in name).dtype == torch.float16
    allocator = RankAllocator(bare, their_config(), "default")
    pattern: dict[str, list[bool]] = {}

    def allocate(step: int) -> None:
        found = allocator.update_and_allocate(bare, step, force_mask=step == STEPS - 8)[1]
        pattern.update(found or {})

    trainable = [p for name, p in bare.named_parameters() if "lora_" in name]
    run(bare, allocate, torch.optim.SGD(trainable, lr=0.02))
    assert sum(map(sum, pattern.values())) == 0  # not one triplet is left

    model = ours(toy().half())
    optimizer = adamw(model)
    live = adalora.RankAllocator(model, STEPS).attach(optimizer)
    largest: dict[Any, float] = {}
    live.on_allocate.append(
        lambda *_: largest.update((p, float(s[SENSITIVITY].max())) for p, s in optimizer.state.items())
    )
    run(model, lambda step: None, optimizer)
    assert {p.dtype for p in adalora.adapter_parameters(model)} == {torch.float32}
    assert live.live == live_e(model) == TARGET
    assert all(largest[p] > 0 for p in adalora.adapter_parameters(model))


def test_C2_ties_prune_exactly_as_many_as_asked() -> None:
    model = theirs()
    optimizer = adamw(model, lr=0.0)
    for step in range(7):
        (model(*batch(step)).logits * 0).sum().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 0  # the budget was 21

    model = ours(orth_reg_weight=0.0)
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model, STEPS).attach(optimizer)
    for step in range(7):
        (model(*batch(step)).logits * 0).sum().backward()
        optimizer.step()
    assert allocator.live == allocator.budget == 21


def test_C3_one_infinite_gradient_does_not_blind_the_method() -> None:
    model = theirs()
    train_theirs(model, poison=5)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == START  # for ever

    model, clean = ours(), ours()
    train_ours(clean)
    counted = train_ours(model, poison=5)
    assert (counted.step, counted.skipped_steps) == (STEPS - 1, 0)  # the step never was, nor its gradient
    counted.finalize()
    assert counted.live == live_e(model) == TARGET
    model = ours()
    optimizer = adamw(model, lr=0.0)
    allocator = adalora.RankAllocator(model, STEPS).attach(optimizer)
    for step in range(3):
        model(*batch(step)).loss.backward()
        _poison(model, step == 2)
        before = {p: s[SENSITIVITY].clone() for p, s in optimizer.state.items() if step == 2}
        optimizer.param_groups[0]["lr"] = 0.0
        weights = {p: p.detach().clone() for p in adalora.adapter_parameters(model)}
        optimizer.step()  # a loop without a scaler takes it
        with torch.no_grad():
            for p, value in weights.items():
                p.copy_(value)
        optimizer.zero_grad()
    assert allocator.skipped_steps == 1
    assert all(torch.equal(optimizer.state[p][SENSITIVITY], value) for p, value in before.items())


def test_C4_pruned_triplets_stay_out_once_the_pattern_is_final() -> None:
    """Between allocations they may return, there as here: the method needs it. When budgets rest, they may not."""
    counts: list[int] = []
    train_theirs(theirs(tfinal=0), counts=counts)
    assert (counts[36], counts[37]) == (TARGET, START)  # cut, and back one step later, to the end

    counts = []
    model = ours(deltaT=5)
    allocator = train_ours(model, counts=counts)
    assert counts[15] < counts[16] == START
    assert counts[STEPS - 8 :] == [TARGET] * 8
    state = max(float(m.lora_E.detach()[~m.lora_keep].abs().max()) for _, m in named_adapters(model) if m.rank < 6)
    assert (state, allocator.live) == (0.0, TARGET)


def test_C5_importance_sees_the_regularizer_as_documented() -> None:
    """As in the authors' code; with `orth_reg_weight=0` and the penalty elsewhere it would be the task alone."""
    from adalora import importance

    assert "clipped and with the regularizer" in " ".join((importance.__doc__ or "").split())
    for weight in (0.0, 0.1):
        model = ours(orth_reg_weight=weight)
        optimizer = adamw(model)
        adalora.RankAllocator(model, STEPS).attach(optimizer)
        model(*batch(0)).loss.backward()
        A = model.two.lora_A
        excess = A.detach() @ A.detach().T - torch.eye(6)
        task = A.grad.clone()  # 0 while E is 0
        total = task + weight * 2 * excess @ A.detach() / excess.norm() / 8
        optimizer.step()
        wanted = 0.15 * (A.detach() * total).abs()
        assert float((optimizer.state[A][SENSITIVITY] - wanted).abs().max()) <= 1e-8
        assert (float(wanted.max()) > 0) is (weight > 0)


def test_C6_ranks_can_be_bounded_for_each_module() -> None:
    """A budget in parameters is planned; bounds already keep rank from gathering in one place."""
    model = ours(min_rank=1, max_rank={"one": 4})
    assert train_ours(model).live == TARGET
    ranks = adalora.rank_report(model).ranks
    assert min(ranks.values()) >= 1
    assert ranks["one"] <= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_C7_a_16_bit_base_takes_its_own_inputs(dtype: torch.dtype, tmp_path: Path) -> None:
    model = ours()
    train_ours(model)
    adalora.save_adapter(model, tmp_path / "adapter")
    loaded = adalora.load_adapter(toy().to(dtype), tmp_path / "adapter")
    x = batch(999)[0]
    with torch.no_grad():
        out = loaded(x.to(dtype)).logits
    assert out.dtype == dtype
    assert loaded.one.lora_A.dtype == torch.float32
    assert float((out.float() - outputs(model)).abs().max()) <= 0.05


def test_C9_injection_changes_nothing() -> None:
    assert torch.equal(outputs(ours()), outputs(toy()))


# --- D: regularizer -----------------------------------------------------------------------------------------


def penalty_norm(model: nn.Module, accumulation: int, weight: float = 1.0) -> float:
    """Norm of the gradient of A and B that the regularizer alone gives in one step."""
    adapters = dict(named_adapters(model)).values()
    # A first step with rate 0 and no gradient would be a checkpoint's rehearsal.
    optimizer = torch.optim.SGD(adalora.adapter_parameters(model), lr=1e-30)
    adalora.RankAllocator(model, STEPS).attach(optimizer)
    for step in range(accumulation):
        (model(batch(step)[0]).logits.sum() * 0).backward()
    optimizer.step()
    gradients = [p.grad.flatten() for m in adapters for p in (m.lora_A, m.lora_B)]
    return float(torch.cat(gradients).norm())


class TupleToy(Toy):
    """Returns a tuple, as transformers' models do with return_dict=False."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = super().forward(x, labels)
        return out.loss, out.logits


class DictToy(Toy):
    """Returns a dict of losses."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = super().forward(x, labels)
        return SimpleNamespace(loss={"main": out.loss}, logits=out.logits)


LOSSES: dict[str, tuple[type[Toy], Callable[[Any], Tensor]]] = {
    "of the model": (Toy, lambda model: model(*batch(0)).loss),
    "in a tuple": (TupleToy, lambda model: model(*batch(0))[0]),
    "outside": (Toy, lambda model: F.cross_entropy(model(batch(0)[0]).logits * 4, batch(0)[1])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_D1_the_regularizer_does_not_depend_on_who_computes_the_loss(name: str) -> None:
    kind, loss = LOSSES[name]
    model = theirs(toy(kind))
    loss(model.base_model).backward()
    gradient = max(float(p.grad.abs().max()) for key, p in model.named_parameters() if "lora_A" in key)
    assert (gradient > 0) is (name == "of the model")  # E is 0, so all of it is the regularizer's
    model.zero_grad()
    loss(model).backward()  # of a PeftModel without a task type
    assert max(float(p.grad.abs().max()) for key, p in model.named_parameters() if "lora_A" in key) == 0

    model = ours(toy(kind))
    optimizer = adamw(model)
    adalora.RankAllocator(model, STEPS).attach(optimizer)
    loss(model).backward()
    optimizer.step()
    reference = penalty_norm(ours(), 1)
    gradients = [p.grad.flatten() for m in dict(named_adapters(model)).values() for p in (m.lora_A, m.lora_B)]
    assert float(torch.cat(gradients).norm()) == pytest.approx(reference, rel=1e-6)
    assert reference > 1e-3


def test_D2_losses_are_the_models_own_in_evaluation_and_without_adapter() -> None:
    with torch.no_grad():
        base = float(toy().eval()(*batch(0)).loss)
        model = theirs().eval()
        shifted = float(loss_there(model, 0))
        with model.disable_adapter():
            assert float(loss_there(model, 0)) == pytest.approx(shifted)
        assert shifted > base + 0.5

        model = ours()
        assert float(model.eval()(*batch(0)).loss) == base
        assert float(model.train()(*batch(0)).loss) == base
        with adalora.disabled(model):
            assert float(model(*batch(0)).loss) == base
    assert float(adalora.orthogonality_penalty(model).detach()) > 1.0  # on request


def test_D3_a_loaded_adapter_computes_a_loss(tmp_path: Path) -> None:
    model = their_folder(tmp_path / "theirs")
    with peft_warnings():
        loaded = peft.PeftModel.from_pretrained(toy(), str(tmp_path / "theirs"))
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        loss_there(loaded, 0)

    with torch.no_grad():
        mine = adalora.load_adapter(toy(), tmp_path / "theirs")
        logits = model(batch(0)[0]).logits
        wanted = float(F.cross_entropy(logits * 4, batch(0)[1]))
        assert float(mine(*batch(0)).loss) == pytest.approx(wanted, abs=1e-6)


def test_D4_the_regularizer_does_not_grow_with_accumulation() -> None:
    norms = []
    for accumulation in (1, 2, 4):
        model = theirs()
        for step in range(accumulation):  # a loss that is normalized over all of them, as a Trainer's
            x, labels = batch(step)
            out = model.base_model(x, labels)
            (out.loss - (1 - 1 / accumulation) * F.cross_entropy(out.logits * 4, labels)).backward()
        norms.append(_norm_of(model, "lora_A"))
    assert norms[1] / norms[0] == pytest.approx(2, rel=1e-4)
    assert norms[2] / norms[0] == pytest.approx(4, rel=1e-4)

    found = [penalty_norm(ours(), accumulation) for accumulation in (1, 2, 4)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def _norm_of(model: nn.Module, part: str) -> float:
    return float(torch.cat([p.grad.flatten() for name, p in model.named_parameters() if part in name]).norm())


def test_D5_a_dict_of_losses_is_nobodys_business() -> None:
    model = ours(toy(DictToy))
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model, STEPS).attach(optimizer)
    for step in range(STEPS):
        model(*batch(step)).loss["main"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.live == live_e(model) == TARGET


def test_D6_reentrant_checkpointing_changes_nothing() -> None:
    """With two processes: test_D6_reentrant_checkpointing_in_two_processes."""
    plain, again = ours(), ours(toy(Checkpointed))
    for model in (plain, again):
        optimizer = adamw(model)
        adalora.RankAllocator(model, STEPS).attach(optimizer)
        for step in range(STEPS):
            model(*_inputs(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), again.parameters(), strict=True))


def test_D7_weight_and_form_of_the_regularizer_are_the_authors() -> None:
    config = adalora.AdaLoraConfig()
    assert (config.orth_reg_weight, config.orth_reg_form) == (0.1, "norm")  # their scripts: 0.1 to 0.3
    assert "orth_reg_weight: the factor gamma" in (adalora.AdaLoraConfig.__doc__ or "")
    # At the start for rank 64 on Llama-3.2-3B's q (3072 x 3072) and v (3072 x 1024): 1.47 with PEFT's weight 0.5.
    model = nn.ModuleDict({"q": nn.Linear(3072, 3072, bias=False), "v": nn.Linear(3072, 1024, bias=False)})
    adalora.inject(model, adalora.AdaLoraConfig(init_r=64, target_r=32))
    start = float(adalora.orthogonality_penalty(model).detach())
    assert 0.5 * start == pytest.approx(1.47, abs=0.05)
    assert config.orth_reg_weight * start == pytest.approx(0.29, abs=0.02)


# --- E: save, load, resume ----------------------------------------------------------------------------------


def test_E1_training_resumes_bit_exactly(tmp_path: Path) -> None:
    """In every phase of a Trainer: test_transformers.py::test_resume_is_bit_exact_in_every_phase."""
    their_folder(tmp_path / "theirs", steps=20)
    fresh = theirs()
    with peft_warnings(), pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_adapter(str(tmp_path / "theirs"), "default", is_trainable=True)  # as the Trainer resumes

    whole = ours()
    optimizer = adamw(whole)
    allocator = train_ours(whole, 20, optimizer)
    state = copy.deepcopy({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    train_ours(whole, range(20, STEPS), optimizer)
    resumed = ours()
    resumed.load_state_dict(state["model"])
    optimizer = adamw(resumed)
    optimizer.load_state_dict(state["optimizer"])
    allocator = train_ours(resumed, range(20, STEPS), optimizer)
    assert (allocator.step, allocator.live) == (STEPS, TARGET)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_E2_training_on_from_a_stored_adapter_keeps_its_budget(tmp_path: Path) -> None:
    model = their_folder(tmp_path / "theirs")
    with peft_warnings():
        again = peft.PeftModel.from_pretrained(toy(), str(tmp_path / "theirs"), is_trainable=True)
    train_theirs(again, 32)  # up to the final phase, where it raises
    kept = sum(map(sum, again.peft_config["default"].rank_pattern.values()))
    assert kept < TARGET  # of 12 that were there, and of 12 that were wanted

    again = adalora.load_adapter(toy(), tmp_path / "theirs", trainable=True)
    assert float((outputs(again) - outputs(model)).abs().max()) <= 1e-6
    allocator = train_ours(again)
    assert allocator.schedule.initial_budget == allocator.schedule.target_budget == TARGET
    assert allocator.live == live_e(again) == TARGET


def test_E3_a_save_in_mid_training_holds_what_the_model_computes(tmp_path: Path) -> None:
    model = their_folder(tmp_path / "theirs", steps=20)  # the last mask was at step 18
    with peft_warnings():
        loaded = peft.PeftModel.from_pretrained(toy(), str(tmp_path / "theirs"))
    assert float((outputs(loaded) - outputs(model)).abs().max()) > 1e-4

    model = ours()
    train_ours(model, 20)
    assert adalora.save_adapter(model, tmp_path / "ours", warn=False) == 0.0
    for loaded in (adalora.load_adapter(toy(), tmp_path / "ours"), _in_peft(tmp_path / "ours")):
        assert float((outputs(loaded) - outputs(model)).abs().max()) <= 1e-6


def _in_peft(folder: Path, base: nn.Module | None = None) -> Any:
    with peft_warnings():
        return peft.PeftModel.from_pretrained(toy() if base is None else base, str(folder))


def cut(model: Any, ranks: dict[str, int]) -> Any:
    """`model`, trained, with other ranks than it learned."""
    train_ours(model)
    with torch.no_grad():
        for name, module in named_adapters(model):
            module.lora_keep.copy_(torch.arange(module.capacity) >= module.capacity - ranks[name])
            module.lora_E.copy_(torch.randn(module.capacity, 1))
            module.lora_E.masked_fill_(~module.lora_keep.view(-1, 1), 0.0)
    return model


RAGGED = {"one": 0, "two": 6, "three": 1, "four": 5}


def test_E4_rank_zero_is_a_rank_like_any_other(tmp_path: Path) -> None:
    model = cut(ours(), RAGGED)
    adalora.save_adapter(model, tmp_path / "adapter")
    loaded = adalora.load_adapter(toy(), tmp_path / "adapter")
    assert adalora.rank_report(loaded).ranks == RAGGED
    assert float((outputs(loaded) - outputs(model)).abs().max()) <= 1e-6
    adalora.merge(loaded)
    assert float((outputs(loaded) - outputs(model)).abs().max()) <= 1e-5
    adalora.unmerge(loaded)
    trainable = adalora.load_adapter(toy(), tmp_path / "adapter", trainable=True)
    assert train_ours(trainable).live == TARGET


def test_E5_a_pruned_adapter_is_built_at_its_stored_ranks(tmp_path: Path) -> None:
    their_folder(tmp_path / "theirs")
    with peft_warnings(), pytest.raises(NotImplementedError):
        peft.PeftModel.from_pretrained(toy(), str(tmp_path / "theirs"), low_cpu_mem_usage=True)

    loaded = adalora.load_adapter(toy(), tmp_path / "theirs")
    assert sum(module.capacity for _, module in named_adapters(loaded)) == TARGET
    wanted = sum(value.numel() for value in load_file(tmp_path / "theirs" / "adapter_model.safetensors").values())
    assert sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name) == wanted == TARGET * 17


def test_E6_an_exported_adapter_loads_in_transformers(tmp_path: Path) -> None:
    modules = ["query", "key", "value", "attention.output.dense"]
    ids = torch.arange(1, 9).view(1, 8)
    model = adalora.inject(tiny_bert().eval(), adalora.AdaLoraConfig(**SCHEDULE, target_modules=modules))
    cut_ranks = dict(zip([name for name, _ in named_adapters(model)], (0, 6, 1, 5), strict=True))
    with torch.no_grad():
        for name, module in named_adapters(model):
            module.lora_keep.copy_(torch.arange(6) < cut_ranks[name])
            module.lora_E.copy_(50 * torch.randn(6, 1) * module.lora_keep.view(-1, 1))
    adalora.injection.record_progress(model, adalora.injection.Progress(STEPS, STEPS))
    adalora.save_adapter(model, tmp_path / "adapter")
    with peft_warnings(), pytest.raises(RuntimeError, match="mismatch"):
        tiny_bert().load_adapter(str(tmp_path / "adapter"))

    adalora.export_lora(model, tmp_path / "lora")
    plain = tiny_bert().eval()
    with peft_warnings():
        plain.load_adapter(str(tmp_path / "lora"))
    with torch.no_grad():
        assert float((plain(ids).logits - model(ids).logits).abs().max()) <= 1e-6
        assert float((plain(ids).logits - tiny_bert().eval()(ids).logits).abs().max()) > 1e-3


def test_E7_loading_warns_of_nothing(tmp_path: Path) -> None:
    model = their_folder(tmp_path / "theirs")
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        peft.PeftModel.from_pretrained(toy(), str(tmp_path / "theirs"))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = adalora.load_adapter(toy(), tmp_path / "theirs")
    assert caught == []
    assert float((outputs(loaded) - outputs(model)).abs().max()) <= 1e-6


class Awkward(nn.Module):
    """Names that text replacement would trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
        self.default = nn.Linear(8, 8)
        self.lora_Ax = nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        for layer in [*self.model["layers"], self.default, self.lora_Ax]:
            x = torch.tanh(layer(x))
        return SimpleNamespace(logits=x, loss=None if labels is None else F.cross_entropy(x * 4, labels))


def test_E8_names_are_structure_not_text(tmp_path: Path) -> None:
    def awkward() -> nn.Module:
        torch.manual_seed(1)
        return Awkward()

    there = peft.get_peft_model(awkward(), their_config(["0", "1"]), adapter_name="layers")
    with peft_warnings(), pytest.raises(KeyError):
        train_theirs(there)
        there.save_pretrained(str(tmp_path / "theirs"))

    model = ours(awkward())
    assert train_ours(model).live == TARGET
    adalora.save_adapter(model, tmp_path / "ours")
    loaded = adalora.load_adapter(awkward(), tmp_path / "ours")
    assert list(adalora.rank_report(loaded).ranks) == ["model.layers.0", "model.layers.1", "default", "lora_Ax"]
    assert float((outputs(loaded) - outputs(model)).abs().max()) <= 1e-6


def test_E9_the_scale_survives_a_reload(tmp_path: Path) -> None:
    model = theirs(lora_alpha=0)
    train_theirs(model)
    with peft_warnings():
        model.save_pretrained(str(tmp_path / "theirs"))
        again = peft.PeftModel.from_pretrained(toy(), str(tmp_path / "theirs"))
    assert float((outputs(again) - outputs(model)).abs().max()) > 1e-3

    mine = adalora.load_adapter(toy(), tmp_path / "theirs")
    assert float((outputs(mine) - outputs(model)).abs().max()) <= 1e-5
    with pytest.raises(ConfigError, match=r"lora_alpha is 0; it must be above 0"):
        adalora.AdaLoraConfig(lora_alpha=0)
    model = ours()
    train_ours(model)
    loaded = adalora.load_adapter(toy(), stored(model, tmp_path / "ours"))
    assert {module.scaling for _, module in named_adapters(loaded)} == {12 / (6 + 1e-5)}
    assert float((outputs(loaded) - outputs(model)).abs().max()) <= 1e-6


def test_E10_the_averages_are_in_the_optimizers_state() -> None:
    model = theirs()
    optimizer = train_theirs(model, 10)
    assert model.base_model.rankallocator.exp_avg_ipt
    assert not any("ipt" in key for key in [*model.state_dict(), *optimizer.state_dict()["state"][0]])

    model = ours()
    optimizer = adamw(model)
    train_ours(model, 10, optimizer)
    saved = optimizer.state_dict()
    assert all({"adalora_sensitivity", "adalora_uncertainty"} <= set(state) for state in saved["state"].values())
    assert saved["param_groups"][0]["adalora_step"] == 10


# --- The table ----------------------------------------------------------------------------------------------

ROWS = {"A": 8, "B": 7, "C": 5, "D": 7, "E": 9}


def test_the_table_names_every_row_and_only_tests_that_exist() -> None:
    here = Path(__file__).resolve().parent
    table = (here.parent / "docs" / "peers.md").read_text(encoding="utf-8")
    wanted = {f"{letter}{number}" for letter, count in ROWS.items() for number in range(1, count + 1)}
    rows = re.findall(r"^\| ([A-E]\d+) \|", table, re.MULTILINE)
    assert wanted <= set(rows)
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", table)
    assert len(named) >= len(wanted)
    for file, test in named:
        assert f"\ndef {test}(" in (here / file).read_text(encoding="utf-8"), f"{file}::{test}"
    proofs = {name for _, name in named}
    mine = set(re.findall(r"^def (test_[A-E]\d+_\w+)\(", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    assert mine <= proofs
    for row in wanted:
        assert any(name.startswith(f"test_{row}_") for name in mine), row


if __name__ == "__main__":
    sys.exit(processes.forked(worker, Path(sys.argv[1]), 2))
