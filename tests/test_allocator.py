"""RankAllocator against the naive twin, and in every kind of loop that people write."""

import copy
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adalora
import reference
from adalora.averages import SENSITIVITY, UNCERTAINTY
from adalora.errors import ConfigError, InjectionError, TrainingError
from adalora.injection import adapter_config, named_adapters, training_progress
from adalora.regularizer import penalty_gradients
from adalora.schedule import Phase

F64 = torch.float64
SCHEDULE: dict[str, Any] = {"init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 10, "deltaT": 4, "total_step": 40}


class Pair(nn.Module):
    """Two matrices in a row, 5 -> 6 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6, bias=False)
        self.second = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Data:
    """One batch for each step."""

    def __init__(self, steps: int = 100, dtype: torch.dtype = F64) -> None:
        self.x = torch.randn(steps, 8, 5, dtype=dtype)
        self.y = torch.randn(steps, 8, 4, dtype=dtype)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        return (model(self.x[step]) - self.y[step]).square().mean()


def adapted(dtype: torch.dtype = F64, **settings: Any) -> Pair:
    torch.manual_seed(1)
    return adalora.inject(Pair().to(dtype), adalora.AdaLoraConfig(**SCHEDULE | settings))


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(adalora.adapter_parameters(model), **{"lr": 0.03} | settings)


def sgd(model: nn.Module, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(adalora.adapter_parameters(model), **{"lr": 0.5} | settings)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    steps: range | int = 40,
    seen: Callable[[int], None] | None = None,
) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        data.loss(model, step).backward()
        optimizer.step()
        if seen is not None:
            seen(step)


def nonzero(model: nn.Module) -> int:
    return sum(int((module.lora_E != 0).sum()) for _, module in named_adapters(model))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


def keeps(model: nn.Module) -> list[list[bool]]:
    return [module.lora_keep.tolist() for _, module in named_adapters(model)]


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- A whole run against the twin ---------------------------------------------------------------------------

FORMS = ("norm", "squared")
METRICS = ("sensitivity*uncertainty", "sensitivity", "magnitude")
SCHEDULES = {
    "no final phase": {"tfinal": 0},
    "no final phase, deltaT divides nothing": {"tfinal": 0, "deltaT": 7},
    "deltaT divides nothing": {"deltaT": 7},
    "deltaT longer than the run": {"deltaT": 1000},
    "every step": {"deltaT": 1, "tinit": 0},
    "nothing to prune": {"init_r": 3, "target_r": 3},
    "everything pruned": {"target_r": 0},
    "guaranteed minimum": {"min_rank": 1, "target_r": 2},
    "guaranteed minimum of one module": {"min_rank": {"second": 2}, "target_r": 1},
    "one step of reduction": {"tinit": 29, "tfinal": 10},
    "no regularizer": {"orth_reg_weight": 0.0},
    "slow averages": {"beta1": 0.99, "beta2": 0.5},
}


def assert_run_equals_twin(optimizer: str, **settings: Any) -> None:
    model, data = adapted(**settings), Data()
    config, modules = model.adalora_config, list(named_adapters(model))
    allocator = adalora.RankAllocator(model)
    decay = 0.05 if optimizer == "adamw" else 0.0
    lr = 0.03 if optimizer == "adamw" else 0.3
    minimum = config.min_rank
    expected = reference.train_reference(
        [{"W": m.weight, "A": m.lora_A, "E": m.lora_E, "B": m.lora_B} for _, m in modules],
        lambda t, w: (torch.tanh(data.x[t] @ w[0].T) @ w[1].T - data.y[t]).square().mean(),
        lora_alpha=config.lora_alpha,
        init_r=config.init_r,
        target=2 * config.target_r,
        **{name: getattr(config, name) for name in ("tinit", "tfinal", "deltaT", "total_step")},
        lr=lr,
        optimizer=optimizer,
        weight_decay=decay,
        **{name: getattr(config, name) for name in ("beta1", "beta2", "orth_reg_weight", "orth_reg_form")},
        importance=config.importance,
        minimum=[minimum.get(name, 0) for name, _ in modules] if isinstance(minimum, dict) else minimum,
    )
    live = adamw(model, lr=lr, weight_decay=decay) if optimizer == "adamw" else sgd(model, lr=lr)
    allocator.attach(live)

    def compare(step: int) -> None:
        for index, (_, module) in enumerate(modules):
            for part in "AEB":
                torch.testing.assert_close(
                    getattr(module, f"lora_{part}").detach(), getattr(expected, part)[step][index], rtol=0, atol=1e-10
                )
        assert keeps(model) == expected.keeps[step], step
        assert allocator.budget == expected.budgets[step]
        if expected.masked[step]:
            assert nonzero(model) <= expected.budgets[step]

    last: dict[tuple[str, str], Tensor] = {}

    def remember(*_: object) -> None:
        for index, (_, module) in enumerate(modules):
            for part in "AEB":
                state = live.state[getattr(module, f"lora_{part}")]
                last.update({(f"{index}.{part}", key): state[key].clone() for key in (SENSITIVITY, UNCERTAINTY)})

    if config.importance != "magnitude":
        allocator.on_allocate.append(remember)
    train(model, live, data, config.total_step, compare)
    assert allocator.live == 2 * config.target_r
    assert allocator.frozen
    assert not any({SENSITIVITY, UNCERTAINTY} & set(state) for state in live.state.values())  # freed
    for (name, key), value in last.items():
        twin = expected.importance.sensitivity if key == SENSITIVITY else expected.importance.uncertainty
        torch.testing.assert_close(value, twin(name), rtol=0, atol=1e-10)
    assert len(last) == (0 if config.importance == "magnitude" else 2 * 3 * len(modules))


# Every pair of two choices, not every triple: the penalty, the averages and the step are three hooks of their own.
@pytest.mark.parametrize(
    "optimizer,form,importance",
    [(("adamw", "sgd")[(i + j) % 2], form, metric) for i, form in enumerate(FORMS) for j, metric in enumerate(METRICS)],
)
def test_whole_run_equals_the_twin(optimizer: str, form: str, importance: str) -> None:
    # The squared form is about a hundred times steeper; its weight follows.
    weight = 0.1 if form == "norm" else 0.002
    assert_run_equals_twin(optimizer, orth_reg_form=form, importance=importance, orth_reg_weight=weight)


@pytest.mark.parametrize(
    "optimizer,name",
    [*((("adamw", "sgd")[i % 2], name) for i, name in enumerate(SCHEDULES)), ("adamw", "one step of reduction")],
)
def test_whole_run_equals_the_twin_on_every_schedule(optimizer: str, name: str) -> None:
    """With either optimizer in turn; a single cut with both, of which AdamW's averages outlive it and SGD has none."""
    assert_run_equals_twin(optimizer, **SCHEDULES[name])


# --- Budgets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [adamw, sgd])
def test_counts_of_live_triplets_follow_the_recorded_vector(make: Any) -> None:
    """V6: masked at 4, 8, 12, ...; all 8 back one step later; 2 from the frozen step on."""
    model, data, counts = adapted(), Data(), []
    optimizer = make(model)
    adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, seen=lambda step: counts.append(nonzero(model)))
    assert [counts[step] for step in (4, 8, 12, 16, 20, 24, 28)] == [6, 4, 3, 2, 2, 2, 2]
    assert [counts[step] for step in (5, 9, 13, 17, 21, 25, 29)] == [8] * 7
    assert counts[30:] == [2] * 10


@pytest.mark.parametrize("tfinal", [0, 1, 10, 36])
@pytest.mark.parametrize("deltaT", [1, 7, 15, 1000])
def test_final_ranks_sum_to_budget_exactly(tfinal: int, deltaT: int) -> None:
    """Peers B4: also without a final phase, and where no multiple of deltaT is left."""
    model, data = adapted(tfinal=tfinal, deltaT=deltaT), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data)
    assert (allocator.live, nonzero(model), allocator.frozen) == (2, 2, True)


def test_pruned_triplets_come_back_before_the_final_phase_and_never_in_it() -> None:
    """Peers C4: the mask is no dead end while budgets move, and holds after every step once they do not."""
    model, data, history = adapted(), Data(), []
    optimizer = adamw(model)
    adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, seen=lambda step: history.append(keeps(model)))
    flat = [[flag for flags in keep for flag in flags] for keep in history]
    returned = [any(not old and new for old, new in zip(a, b, strict=True)) for a, b in itertools.pairwise(flat)]
    assert any(returned[:29])  # granted again by a later allocation
    assert flat[30:] == [flat[30]] * 10


def test_equal_initial_and_target_rank_prunes_nothing() -> None:
    """Peers B1: where the k-th smallest of k = 0 raised."""
    model, data = adapted(init_r=3, target_r=3), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data)
    assert (allocator.live, nonzero(model)) == (6, 6)


def test_all_zero_scores_still_meet_the_budget() -> None:
    """Peers C2: scores that all tie prune exactly as many as asked."""
    model, data = adapted(orth_reg_weight=0.0), Data()
    optimizer = sgd(model, lr=0.0)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    with torch.no_grad():
        for parameter in adalora.adapter_parameters(model):
            parameter.zero_()
    train(model, optimizer, data)
    assert allocator.live == 2
    assert keeps(model) == [[True, True, False, False], [False] * 4]


@pytest.mark.parametrize("total_step", [400, 41, 25, 5])
def test_a_wrong_total_still_ends_on_the_budget(total_step: int) -> None:
    """Peers B3: too long, and finalize does it; too short, and the pattern holds beyond the schedule."""
    model, data = adapted(tinit=0.1, tfinal=0.25, deltaT=4, total_step=None), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model, total_step).attach(optimizer)
    train(model, optimizer, data, 40)
    allocator.finalize()
    assert (allocator.live, nonzero(model), allocator.step) == (2, 2, 40)
    train(model, optimizer, data, range(40, 45))
    assert (allocator.live, nonzero(model)) == (2, 2)


@pytest.mark.parametrize("steps", [1, 3, 15, 17, 29])
def test_finalize_enforces_the_budget_wherever_training_stops(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    model, data = adapted(), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, steps)
    phase = allocator.phase
    with caplog.at_level(logging.INFO, logger="adalora"):
        allocator.finalize()
        allocator.finalize()  # the second finds nothing to do
    [line] = [record.getMessage() for record in caplog.records]
    assert f"after step {steps} of 40" in line
    assert f"{phase.value} phase" in line
    assert "2 of 8 triplets" in line
    assert (allocator.live, nonzero(model), allocator.frozen, allocator.budget) == (2, 2, True, 2)
    assert allocator.phase is Phase.FINAL
    pattern = keeps(model)
    train(model, optimizer, data, range(steps, 40))
    assert (keeps(model), nonzero(model)) == (pattern, 2)


def test_finalize_in_the_final_phase_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, data = adapted(), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 33)
    before = snapshot(model)
    with caplog.at_level(logging.INFO, logger="adalora"):
        allocator.finalize()
    assert caplog.records == []
    assert largest_difference(before, snapshot(model)) == 0.0


def test_finalize_needs_an_optimizer_and_a_step() -> None:
    model = adapted()
    allocator = adalora.RankAllocator(model)
    with pytest.raises(TrainingError, match=r"no optimizer yet; call attach\(optimizer\)"):
        allocator.finalize()
    allocator.attach(adamw(model))
    with pytest.raises(TrainingError, match="no optimizer step has run"):
        allocator.finalize()


def test_listeners_hear_every_allocation_and_nothing_else() -> None:
    model, data, heard = adapted(), Data(), []
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    allocator.on_allocate.append(
        lambda step, budget, keep: heard.append((step, budget, sum(int(k.sum()) for k in keep.values()), list(keep)))
    )
    train(model, optimizer, data)
    expected = [(4, 6), (8, 4), (12, 3), (16, 2), (20, 2), (24, 2), (28, 2), (30, 2)]
    assert heard == [(step, budget, budget, ["first", "second"]) for step, budget in expected]


def test_what_a_listener_keeps_does_not_change_later() -> None:
    model, data, heard = adapted(), Data(), []
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    allocator.on_allocate.append(lambda step, budget, keep: heard.append(keep))
    train(model, optimizer, data)
    assert [sum(int(k.sum()) for k in keep.values()) for keep in heard] == [6, 4, 3, 2, 2, 2, 2, 2]


def test_phase_budget_and_step_tell_where_the_run_is() -> None:
    model, data, seen = adapted(), Data(), {}
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    assert (allocator.step, allocator.phase, allocator.budget, allocator.live) == (0, Phase.WARMUP, 8, 8)

    def note(step: int) -> None:
        assert training_progress(model) == (step + 1, 40)
        seen[step] = (allocator.step, allocator.phase, allocator.budget)

    train(model, optimizer, data, seen=note)
    assert seen[1] == (2, Phase.WARMUP, 8)
    assert seen[2] == (3, Phase.REDUCTION, 8)
    assert seen[8] == (9, Phase.REDUCTION, 4)
    assert seen[29] == (30, Phase.FINAL, 2)
    assert seen[39] == (40, Phase.FINAL, 2)


def test_rank_bounds_hold_through_the_whole_run() -> None:
    model, data, ranks = adapted(min_rank={"first": 2}, max_rank={"second": 3}, target_r=2), Data(), []
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    assert allocator.schedule.initial_budget == 7
    train(model, optimizer, data, seen=lambda step: ranks.append((model.first.rank, model.second.rank)))
    assert min(first for first, _ in ranks) >= 2
    assert max(second for _, second in ranks) == 3
    assert sum(ranks[-1]) == allocator.live == 4


def test_a_length_is_needed_and_must_not_contradict() -> None:
    """Peers B3: one clear error, at construction."""
    model = adapted(total_step=None, tinit=0.1, tfinal=0.4)
    with pytest.raises(ConfigError, match=r"how long will training be\? Pass RankAllocator\(model, total_step=...\)"):
        adalora.RankAllocator(model)
    assert adalora.RankAllocator(model, 100).schedule.tinit == 10
    model = adapted()
    with pytest.raises(ConfigError, match="says total_step=40, but the loop runs 50"):
        adalora.RankAllocator(model, 50)
    assert adalora.RankAllocator(model, 40).schedule.total_step == 40
    with pytest.raises(ConfigError, match=r"tinit \(2\) and tfinal \(10\).*has 12 in all"):
        adalora.RankAllocator(adapted(total_step=None), 12)


def test_a_model_without_adapter_is_refused() -> None:
    with pytest.raises(InjectionError, match=r"Pair has no adapter; call adalora\.inject"):
        adalora.RankAllocator(Pair(), 10)


# --- Loops: accumulation, clipping, closures, loss scaling, wrappers ----------------------------------------


def reference_run(steps: int = 40, **settings: Any) -> tuple[dict[str, Tensor], list[list[bool]]]:
    torch.manual_seed(5)
    data, model = Data(), adapted(**settings)
    optimizer = adamw(model)
    adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, steps)
    return snapshot(model), keeps(model)


@pytest.mark.parametrize("pieces", [2, 4])
def test_gradient_accumulation_changes_nothing(pieces: int) -> None:
    """Peers D4 and A3: steps are the optimizer's, and the regularizer joins once, whatever the micro-batches."""
    expected, pattern = reference_run()
    torch.manual_seed(5)
    data, model = Data(), adapted()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    for step in range(40):
        for x, y in zip(data.x[step].chunk(pieces), data.y[step].chunk(pieces), strict=True):
            ((model(x) - y).square().mean() / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.step == 40
    assert largest_difference(snapshot(model), expected) <= 1e-10
    assert keeps(model) == pattern


def test_importance_sees_clipped_gradients_and_the_whole_regularizer() -> None:
    """V4 and peers C5: I = |weight after the step · (clipped gradient + γ ∂R)|, clipping as the loop does it."""
    model, data = adapted(), Data()
    optimizer = sgd(model)
    adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 1)
    modules = [module for _, module in named_adapters(model)]
    before = {p: optimizer.state[p][SENSITIVITY].clone() for p in adalora.adapter_parameters(model)}
    optimizer.zero_grad()
    data.loss(model, 1).backward()
    norm = torch.nn.utils.clip_grad_norm_(adalora.adapter_parameters(model), 1e-3)
    assert norm > 1e-3
    clipped = {p: p.grad.clone() for p in adalora.adapter_parameters(model)}
    rows = [part for m in modules for part in (m.lora_A.detach().clone(), m.lora_B.detach().T.clone())]
    added = iter(penalty_gradients(rows, "norm"))
    for module in modules:
        clipped[module.lora_A] += 0.1 * next(added)
        clipped[module.lora_B] += 0.1 * next(added).T
    optimizer.step()
    for parameter, gradient in clipped.items():
        expected = 0.85 * before[parameter] + 0.15 * (parameter.detach() * gradient).abs()
        torch.testing.assert_close(optimizer.state[parameter][SENSITIVITY], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("keyword", [False, True])
def test_closures_change_nothing(keyword: bool) -> None:
    """The pre-step hook runs before such a step's backward: what lies in .grad then belongs to no step."""
    expected, pattern = reference_run()
    torch.manual_seed(5)
    data, model, losses = Data(), adapted(), []
    optimizer = adamw(model)
    adalora.RankAllocator(model).attach(optimizer)
    for step in range(40):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = data.loss(model, step)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        losses.append(loss.detach())
    assert largest_difference(snapshot(model), expected) == 0.0
    assert keeps(model) == pattern
    assert len(losses) == 40
    assert torch.stack(losses).isfinite().all()


def test_lbfgs_meets_the_budget() -> None:
    data, model = Data(), adapted()
    optimizer = torch.optim.LBFGS(adalora.adapter_parameters(model), lr=0.5, max_iter=3, line_search_fn="strong_wolfe")
    allocator = adalora.RankAllocator(model).attach(optimizer)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = data.loss(model, 0)
        loss.backward()
        # The line search compares objectives, so this loop has to add to the value what the hook adds to the gradient.
        return loss + 0.1 * adalora.orthogonality_penalty(model).detach()

    for _ in range(40):
        losses.append(optimizer.step(closure).item())
    assert (allocator.step, allocator.live, nonzero(model)) == (40, 2, 2)
    assert losses[-1] < losses[0]


SCALED = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.03),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.03, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.03, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.3, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.03, fused=True),
}


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
def test_loss_scaling_changes_nothing_and_overflow_is_no_step(make: Any, unscale: bool) -> None:
    """Peers C3: steps 7 and 21 overflow; the run equals one without scaling that never saw their batches."""
    data, plain, scaled = Data(dtype=torch.float32), adapted(torch.float32), adapted(torch.float32)
    optimizer = make(adalora.adapter_parameters(plain))
    adalora.RankAllocator(plain).attach(optimizer)
    overflows = (7, 21)
    for step in [step for step in range(42) if step not in overflows]:
        train(plain, optimizer, data, range(step, step + 1))
    expected = snapshot(plain)

    optimizer = make(adalora.adapter_parameters(scaled))
    allocator = adalora.RankAllocator(scaled).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    for step in range(42):
        before, counted = snapshot(scaled), allocator.step
        averages = {id(p): s[SENSITIVITY].clone() for p, s in optimizer.state.items() if SENSITIVITY in s}
        optimizer.zero_grad()
        loss = data.loss(scaled, step) * (torch.inf if step in overflows else 1.0)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step in overflows:
            assert largest_difference(before, snapshot(scaled)) == 0.0
            assert allocator.step == counted
            for parameter, state in optimizer.state.items():
                assert torch.equal(state[SENSITIVITY], averages[id(parameter)])
    assert allocator.step == 40
    assert allocator.live == nonzero(scaled) == 2
    assert largest_difference(snapshot(scaled), expected) <= 1e-6
    assert keeps(scaled) == keeps(plain)


def test_accelerated_optimizers_are_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, pattern = reference_run()
    torch.manual_seed(5)
    data, model = Data(), adapted()
    optimizer = adamw(model)
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped_model, wrapped = accelerator.prepare(model, optimizer)
    assert type(wrapped).__name__ == "AcceleratedOptimizer"
    allocator = adalora.RankAllocator(wrapped_model).attach(wrapped)
    for step in range(40):
        wrapped.zero_grad()
        accelerator.backward(data.loss(wrapped_model, step))
        wrapped.step()
    assert allocator.step == 40
    assert largest_difference(snapshot(model), expected) == 0.0
    assert keeps(model) == pattern


def test_a_wrapper_around_the_model_is_seen_through() -> None:
    """Peers A8: the allocator finds the adapted model inside."""
    model = adapted()
    allocator = adalora.RankAllocator(nn.Sequential(model))
    assert allocator.root is model
    assert list(allocator.modules) == ["first", "second"]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    name: {}
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam", "LBFGS")  # abstract; sparse gradients only; closures only
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_torch_optimizer_ends_on_the_budget_and_resumes_bit_exactly(name: str) -> None:
    """Peers E10: the averages travel in whatever state_dict the optimizer has."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(adalora.adapter_parameters(model), lr=0.01)

    # fp32, because NAdam restores its own scalars in the dtype of the parameters.
    data, model = Data(dtype=torch.float32), adapted(torch.float32)
    optimizer = make(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 18)
    other, other_optimizer, other_allocator = resumed(stored(model, optimizer), model, make)
    train(model, optimizer, data, range(18, 40))
    train(other, other_optimizer, data, range(18, 40))
    assert allocator.live == nonzero(model) == other_allocator.live == 2
    assert largest_difference(snapshot(model), snapshot(other)) == 0.0


# --- Gradients that are missing or not finite ---------------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_gradient_changes_no_average(poison: float) -> None:
    """Peers C3: one bad batch must not blind the averages for ever."""
    model, data = adapted(), Data()
    optimizer = sgd(model, lr=0.0)  # the weights survive; what is tested is the averages
    allocator = adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 5)
    before = {p: (s[SENSITIVITY].clone(), s[UNCERTAINTY].clone()) for p, s in optimizer.state.items()}
    data.loss(model, 5).backward()
    with torch.no_grad():
        weights = snapshot(model)
        model.second.lora_A.grad[0, 0] = poison
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    assert allocator.skipped_steps == 1
    for parameter, (sensitivity, uncertainty) in before.items():
        assert torch.equal(optimizer.state[parameter][SENSITIVITY], sensitivity)
        assert torch.equal(optimizer.state[parameter][UNCERTAINTY], uncertainty)
    optimizer.param_groups[0]["lr"] = 0.3
    train(model, optimizer, data, range(6, 40))
    assert allocator.live == nonzero(model) == 2


def test_a_diverged_run_is_an_error_that_names_the_module() -> None:
    model, data = adapted(), Data()
    optimizer = sgd(model)
    adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 4)
    with torch.no_grad():
        model.second.lora_E[1] = torch.nan
    with pytest.raises(TrainingError, match=r"triplets of 'first'|triplets of 'second'"):
        train(model, optimizer, data, range(4, 5))


class Branches(nn.Module):
    """`spare` is used only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(5, 4)
        self.spare = nn.Linear(5, 4)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        return self.used(x) + (self.spare(x) if spare else 0)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_a_module_without_gradient_counts_as_zero_signal(weight: float) -> None:
    """Peers A5: it loses its triplets, nothing raises, and the optimizer initializes it when it joins later."""
    torch.manual_seed(3)
    model = adalora.inject(Branches().double(), adalora.AdaLoraConfig(**SCHEDULE, orth_reg_weight=weight))
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    x, y = torch.randn(8, 5, dtype=F64), torch.randn(8, 4, dtype=F64)
    for step in range(40):
        optimizer.zero_grad()
        (model(x, spare=step >= 35) - y).square().mean().backward()
        optimizer.step()
        if step == 34:
            assert "exp_avg" not in optimizer.state[model.spare.lora_E]
            assert SENSITIVITY not in optimizer.state[model.spare.lora_E]
    assert (model.used.rank, model.spare.rank) == (2, 0)
    assert allocator.live == nonzero(model) == 2
    state = optimizer.state[model.spare.lora_E]
    assert int(state["step"]) == 5
    assert float(state["exp_avg"].abs().max()) > 0


def test_a_module_that_joins_during_reduction_can_win_triplets() -> None:
    torch.manual_seed(3)
    model = adalora.inject(Branches().double(), adalora.AdaLoraConfig(**SCHEDULE, orth_reg_weight=0.0))
    optimizer = adamw(model)
    adalora.RankAllocator(model).attach(optimizer)
    x, y = torch.randn(8, 5, dtype=F64), torch.randn(8, 4, dtype=F64)
    for step in range(40):
        optimizer.zero_grad()
        out = model.spare(x) * 10 if step >= 9 else model.used(x)
        (out - y).square().mean().backward()
        optimizer.step()
        if step == 8:
            assert (model.used.rank, model.spare.rank) == (4, 0)
    assert (model.used.rank, model.spare.rank) == (0, 2)


# --- Attaching ----------------------------------------------------------------------------------------------


def test_attaching_twice_runs_the_method_once() -> None:
    expected, pattern = reference_run()
    torch.manual_seed(5)
    data, model = Data(), adapted()
    optimizer = adamw(model)
    first = adalora.RankAllocator(model)
    assert first.attach(optimizer) is first
    first.attach(optimizer)
    train(model, optimizer, data, 17)
    second = adalora.RankAllocator(model).attach(optimizer)  # replaces the first and takes up its state
    assert second.step == 17
    train(model, optimizer, data, range(17, 40))
    assert second.step == 40
    assert largest_difference(snapshot(model), expected) == 0.0
    assert keeps(model) == pattern


def test_detach_leaves_a_plain_optimizer() -> None:
    model, data = adapted(), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 3)
    allocator.detach()
    train(model, optimizer, data, range(3, 40))
    assert (allocator.step, nonzero(model)) == (3, 8)


def test_a_copied_optimizer_needs_and_takes_a_new_allocator() -> None:
    """deepcopy drops hooks but keeps state; attaching again goes on from there."""
    model, data = adapted(), Data()
    optimizer = adamw(model)
    adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 18)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    allocator = adalora.RankAllocator(other).attach(other_optimizer)
    assert allocator.step == 18
    assert keeps(other) == keeps(model)
    train(model, optimizer, data, range(18, 40))
    train(other, other_optimizer, data, range(18, 40))
    assert largest_difference(snapshot(model), snapshot(other)) == 0.0


def test_parameters_missing_from_the_optimizer_are_named() -> None:
    model = adapted()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n and n != "second.lora_B"])
    with pytest.raises(TrainingError, match=r"second\.lora_B is not in the optimizer; build it from adalora"):
        adalora.RankAllocator(model).attach(optimizer)


def test_an_optimizer_made_before_injection_is_refused() -> None:
    torch.manual_seed(0)
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters())
    adalora.inject(model, adalora.AdaLoraConfig(**SCHEDULE))
    with pytest.raises(TrainingError, match=r"first\.lora_A is not in the optimizer"):
        adalora.RankAllocator(model).attach(optimizer)


def test_duplicate_parameters_are_named() -> None:
    model = adapted()
    optimizer = sgd(model)
    optimizer.param_groups[0]["params"].append(model.first.lora_E)
    with pytest.raises(TrainingError, match=r"first\.lora_E is in the optimizer twice"):
        adalora.RankAllocator(model).attach(optimizer)


def test_frozen_parameters_are_named() -> None:
    model = adapted()
    optimizer = sgd(model)
    model.second.lora_A.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"second\.lora_A is frozen; .*trainable=True"):
        adalora.RankAllocator(model).attach(optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_adapters_are_refused(dtype: torch.dtype) -> None:
    """Peers C1: products of small numbers underflow there, and every rank would go to 0."""
    model = adapted().to(dtype)
    with pytest.raises(TrainingError, match=rf"first\.lora_A is {dtype}; importance is lost in 16 bits"):
        adalora.RankAllocator(model).attach(sgd(model))


def test_two_models_in_one_optimizer_are_refused() -> None:
    """Both would count the steps of one and the same optimizer."""
    one, two = adapted(), adapted()
    optimizer = torch.optim.SGD([*adalora.adapter_parameters(one), *adalora.adapter_parameters(two)], lr=0.1)
    first = adalora.RankAllocator(one).attach(optimizer)
    with pytest.raises(TrainingError, match=r"already runs the allocator of another model .*its own optimizer"):
        adalora.RankAllocator(two).attach(optimizer)
    first.detach()
    adalora.RankAllocator(two).attach(optimizer)


def test_an_adapter_without_any_triplet_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"every module has rank 0.*raise max_rank"):
        adalora.RankAllocator(adapted(max_rank=0, target_r=0))


def test_only_optimizers_can_be_attached_to() -> None:
    with pytest.raises(TrainingError, match="needs a torch optimizer, got list"):
        adalora.RankAllocator(adapted()).attach([])


def test_training_while_merged_is_refused() -> None:
    model, data = adapted(), Data()
    optimizer = adamw(model)
    adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 1)
    adalora.merge(model)
    with pytest.raises(TrainingError, match=r"'first' is merged and would not learn; call adalora\.unmerge"):
        optimizer.step()


def test_training_after_eject_is_refused_until_the_allocator_is_detached() -> None:
    model, data = adapted(), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 1)
    adalora.eject(model)
    with pytest.raises(TrainingError, match=r"'first' was ejected, but an allocator still drives it; call detach"):
        optimizer.step()
    allocator.detach()
    optimizer.step()


# --- Resuming -----------------------------------------------------------------------------------------------


def stored(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a resumed run gets, through a file that may hold tensors and plain values only."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(
    state: dict[str, Any], model: nn.Module, make: Callable[[nn.Module], Any], attach_first: bool = False
) -> tuple[nn.Module, Any, adalora.RankAllocator]:
    """A new process: the base model of `model`, injection, then `state`."""
    fresh, config = copy.deepcopy(model), adapter_config(model)
    adalora.eject(fresh)
    torch.manual_seed(99)
    adalora.inject(fresh, config)
    fresh.load_state_dict(state["model"])
    optimizer = make(fresh)
    allocator = adalora.RankAllocator(fresh)
    if attach_first:
        allocator.attach(optimizer)
    optimizer.load_state_dict(state["optimizer"])
    if not attach_first:
        allocator.attach(optimizer)
    return fresh, optimizer, allocator


MAKERS = {
    "AdamW": adamw,
    "SGD": sgd,
    "SGD with momentum": lambda model: sgd(model, lr=0.1, momentum=0.9),
}
STOPS = (0, 2, 5, 6, 17, 29, 30, 31, 39)  # in every phase, after, before and between allocations


@pytest.mark.parametrize(
    "name,importance,attach_first",
    [
        ("AdamW", METRICS[0], True),
        *(  # in the fast part each optimizer and each metric once
            pytest.param(name, metric, (i + j) % 2 == 1, marks=() if j == (i + 1) % len(METRICS) else pytest.mark.slow)
            for i, name in enumerate(MAKERS)
            for j, metric in enumerate(METRICS)
        ),
    ],
)
def test_resume_is_bit_exact_in_the_middle_of_every_phase(name: str, importance: str, attach_first: bool) -> None:
    """Peers E1 and E2: adapter and optimizer state are all there is. Attached before or after the state is loaded, so
    that each optimizer and each metric meets both, and the usual pair too."""
    make = MAKERS[name]
    model, data, states, patterns, frozen = adapted(importance=importance), Data(), {}, {}, {}
    optimizer = make(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    for step in range(40):
        if step in STOPS:
            states[step], patterns[step], frozen[step] = stored(model, optimizer), keeps(model), allocator.frozen
        train(model, optimizer, data, range(step, step + 1))
    for stop in STOPS[:: 1 if make is sgd else 2]:
        other, other_optimizer, other_allocator = resumed(states[stop], model, make, attach_first)
        assert (other_allocator.step, other_allocator.frozen) == (stop, frozen[stop])
        assert keeps(other) == patterns[stop], stop
        assert training_progress(other) == (stop, 40)
        train(other, other_optimizer, data, range(stop, 40))
        assert largest_difference(snapshot(model), snapshot(other)) == 0.0
        assert keeps(other) == keeps(model)
        assert other_allocator.live == nonzero(other) == 2


def test_resume_after_finalize_stays_final() -> None:
    model, data = adapted(), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 10)
    allocator.finalize()
    other, other_optimizer, other_allocator = resumed(stored(model, optimizer), model, adamw)
    assert other_allocator.frozen
    train(other, other_optimizer, data, range(10, 20))
    assert keeps(other) == keeps(model)
    assert nonzero(other) == 2


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_resume_keeps_the_ranks_of_a_module_that_never_had_a_gradient(make: Any) -> None:
    torch.manual_seed(3)
    config = adalora.AdaLoraConfig(**SCHEDULE, orth_reg_weight=0.0)
    model = adalora.inject(Branches().double(), config)
    optimizer = make(model)
    adalora.RankAllocator(model).attach(optimizer)
    x, y = torch.randn(8, 5, dtype=F64), torch.randn(8, 4, dtype=F64)
    for _ in range(35):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert (model.used.rank, model.spare.rank) == (2, 0)
    other, _, allocator = resumed(stored(model, optimizer), model, make)
    assert (other.used.rank, other.spare.rank) == (2, 0)
    assert allocator.live == 2


@pytest.mark.parametrize("attach_first", [False, True])
def test_state_of_another_size_is_refused(attach_first: bool) -> None:
    """load_state_dict itself accepts moments of any shape in silence."""
    model, data = adapted(), Data()
    optimizer = adamw(model)
    adalora.RankAllocator(model).attach(optimizer)
    train(model, optimizer, data, 5)
    larger = adapted(init_r=6)
    other, allocator = adamw(larger), adalora.RankAllocator(larger)
    with pytest.raises(TrainingError, match=r"for first\.lora_A has shape \(4, 5\), the parameter \(6, 5\)"):
        if attach_first:
            allocator.attach(other)
        other.load_state_dict(optimizer.state_dict())
        allocator.attach(other)


# --- More processes -----------------------------------------------------------------------------------------


@pytest.fixture
def single_process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("single_process_group")
def test_distributed_data_parallel_changes_nothing() -> None:
    """Peers A7, A8, D6: hooks sit on the optimizer, so wrapping and checkpointing the model do not matter."""
    expected, pattern = reference_run()
    torch.manual_seed(5)
    data, model = Data(), adapted()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*hostname.*")
        wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = adamw(wrapped)
    allocator = adalora.RankAllocator(wrapped).attach(optimizer)
    train(wrapped, optimizer, data)
    assert allocator.step == 40
    assert largest_difference(snapshot(model), expected) <= 1e-12
    assert keeps(model) == pattern


# --- Found in review ----------------------------------------------------------------------------------------


def test_a_run_resumed_past_its_new_freeze_step_meets_the_budget_at_once() -> None:
    model, data = adapted(total_step=None), Data()
    optimizer = adamw(model)
    adalora.RankAllocator(model, total_step=100).attach(optimizer)
    train(model, optimizer, data, 30)
    shorter = adalora.RankAllocator(model, total_step=35).attach(optimizer)  # freezes at step 21
    assert not shorter.frozen
    train(model, optimizer, data, 1)
    assert shorter.frozen and shorter.live == shorter.schedule.target_budget
    nonzero = sum(int(module.lora_E.count_nonzero()) for module in shorter.modules.values())
    assert nonzero == shorter.schedule.target_budget


def test_an_ascending_optimizer_lowers_the_regularizer_too() -> None:
    finals = []
    for maximize in (False, True):
        torch.manual_seed(0)
        model = adapted(total_step=None)
        optimizer = torch.optim.SGD(adalora.adapter_parameters(model), lr=2.0, maximize=maximize)
        adalora.RankAllocator(model, total_step=60).attach(optimizer)
        for _ in range(60):
            (sum(p.sum() for p in adalora.adapter_parameters(model)) * 0.0).backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(adalora.orthogonality_penalty(model).item())
    assert finals[0] == finals[1] < 1.9


def test_a_parameter_frozen_after_attach_stays_where_it_is() -> None:
    model, data = adapted(total_step=None), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model, total_step=20).attach(optimizer)
    frozen = next(iter(allocator.modules.values())).lora_A.requires_grad_(False)
    before = frozen.detach().clone()
    train(model, optimizer, data, 5)
    assert torch.equal(frozen, before)


def test_a_step_without_any_gradient_changes_nothing() -> None:
    model = adapted(total_step=None)
    optimizer = adamw(model)
    adalora.RankAllocator(model, total_step=20).attach(optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_casting_after_attach_is_named_with_the_remedy() -> None:
    model = adapted(total_step=None)
    optimizer = adamw(model)
    adalora.RankAllocator(model, total_step=20).attach(optimizer)
    model.bfloat16()
    with pytest.raises(TrainingError, match="bfloat16; importance is lost in 16 bits"):
        optimizer.step()


def test_a_failed_attach_leaves_no_hook() -> None:
    model, data = adapted(total_step=None), Data()
    optimizer = adamw(model)
    adalora.RankAllocator(model, total_step=20).attach(optimizer).detach()
    hooks = len(optimizer._optimizer_step_post_hooks)
    train(model, optimizer, data, 1)
    for parameter in adalora.adapter_parameters(model):
        optimizer.state[parameter]["exp_avg"] = torch.zeros(1)
    with pytest.raises(TrainingError, match="another size"):
        adalora.RankAllocator(model, total_step=20).attach(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == hooks


def test_ranks_survive_a_plain_state_dict() -> None:
    model, data = adapted(total_step=None), Data()
    optimizer = adamw(model)
    allocator = adalora.RankAllocator(model, total_step=20).attach(optimizer)
    train(model, optimizer, data, 20)
    other = adapted(total_step=None)
    other.load_state_dict(model.state_dict())
    assert adalora.rank_report(other).ranks == adalora.rank_report(model).ranks
    assert adalora.rank_report(other).total_rank == allocator.schedule.target_budget
