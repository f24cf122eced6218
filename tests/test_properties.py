"""Whole runs and adapter files of any shape, schedule and type: the budget is met, files compute what the model did."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import adalora
from adalora.allocation import keep_top
from adalora.config import AdaLoraConfig
from adalora.errors import AdaLoraError, ConfigError
from adalora.injection import named_adapters
from adalora.schedule import Schedule

SOME = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
MANY = settings(max_examples=100, deadline=None, derandomize=True)

SIDES = st.integers(1, 5)
FLOATS = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
PHASE = st.one_of(st.integers(0, 12), st.floats(0, 0.99))
ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=2)
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "init_r": st.integers(-1, 9),
    "target_r": st.integers(-1, 9),
    "min_rank": st.one_of(st.integers(-1, 5), st.dictionaries(st.text(max_size=2), st.integers(0, 4), max_size=2)),
    "max_rank": st.one_of(st.none(), st.integers(0, 9)),
    "budget": st.sampled_from(["triplets", "params", "x"]),
    "target_parameters": st.one_of(st.none(), st.integers(-1, 50), st.floats(0, 1)),
    "lora_alpha": st.one_of(st.none(), st.floats(-1, 32)),
    "lora_dropout": st.floats(0, 1),
    "tinit": PHASE,
    "tfinal": PHASE,
    "deltaT": PHASE,
    "total_step": st.one_of(st.none(), st.integers(0, 60)),
    "beta1": st.floats(0, 1),
    "importance": st.sampled_from(["sensitivity*uncertainty", "sensitivity", "magnitude", "fisher", ""]),
    "refactor": st.booleans(),
    "orth_reg_weight": st.floats(-0.1, 1),
    "target_modules": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=2)),
}


@MANY
@given(st.fixed_dictionaries({}, optional={name: st.one_of(value, ODD) for name, value in FIELDS.items()}))
def test_a_configuration_is_refused_or_comes_back_from_json(values: dict[str, Any]) -> None:
    try:
        config = AdaLoraConfig(**values)
    except ConfigError as error:
        assert any(name in str(error) for name in (*AdaLoraConfig.__dataclass_fields__, "regular expression"))
        return
    assert AdaLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@MANY
@given(PHASE, PHASE, PHASE, st.integers(1, 60), st.integers(0, 40), st.integers(0, 40))
def test_a_schedule_is_refused_or_falls_from_the_first_budget_to_the_last(
    tinit: Any, tfinal: Any, delta: Any, total: int, low: int, more: int
) -> None:
    try:
        config = AdaLoraConfig(tinit=tinit, tfinal=tfinal, deltaT=delta)
        schedule = Schedule.from_config(config, low + more, low, total)
    except ConfigError:
        return
    budgets = [schedule.budget(step) for step in range(total)]
    assert all(one >= other for one, other in pairwise(budgets))
    assert low <= budgets[-1] <= budgets[0] <= low + more
    assert budgets[min(schedule.freeze_step, total - 1)] == low or schedule.freeze_step >= total
    assert schedule.allocates(schedule.freeze_step)


class Odd(nn.Module):
    """Matrices of any shape, one row or one column among them."""

    def __init__(self, sides: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(m, n, dtype=dtype) for m, n in pairwise(sides))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@st.composite
def runs(draw: Any) -> tuple[Odd, AdaLoraConfig, int]:
    """A model, a configuration that fits it, and the length of a run. Ranks may be 0 or above both sides."""
    sides, dtype = draw(st.lists(SIDES, min_size=3, max_size=4)), draw(FLOATS)
    init = draw(st.integers(1, 7))
    config = AdaLoraConfig(
        target_modules=[f"layers.{i}" for i in range(len(sides) - 1)],
        init_r=init,
        target_r=draw(st.integers(0, init)),
        lora_alpha=4.0,
        tinit=draw(st.integers(0, 3)),
        tfinal=draw(st.integers(0, 3)),
        deltaT=draw(st.integers(1, 4)),
        importance=draw(st.sampled_from(["sensitivity*uncertainty", "sensitivity", "magnitude", "fisher"])),
        orth_reg_weight=draw(st.sampled_from([0.0, 0.1])),
        refactor=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    return Odd(sides, dtype), config, draw(st.integers(10, 16))


def train(model: Odd, allocator: adalora.RankAllocator, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, model.layers[0].in_features, generator=torch.Generator().manual_seed(step))
        out = model(x.to(model.layers[0].weight.dtype)).float()
        if out.requires_grad:  # else the budget is 0, and all of it was freed
            (out - torch.linspace(-1, 1, 6).unsqueeze(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def outputs(model: Odd) -> Tensor:
    x = torch.linspace(-2, 2, 3 * model.layers[0].in_features).view(3, -1)
    with torch.no_grad():
        return model.eval()(x.to(model.layers[0].weight.dtype))


@SOME
@given(runs())
def test_any_run_is_on_budget_at_every_allocation_and_leaves_files_that_compute_the_same(
    case: tuple[Odd, AdaLoraConfig, int],
) -> None:
    model, config, steps = case
    base = copy.deepcopy(model)
    adalora.inject(model, config)
    assert torch.equal(outputs(model), outputs(base)) or config.init_lora_weights != "gaussian"
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=1e-2)
    allocator = adalora.RankAllocator(model, steps).attach(optimizer)
    seen: list[tuple[int, int]] = []

    def listen(step: int, budget: int, keep: Mapping[str, Tensor]) -> None:
        seen.append((budget, sum(int(mask.sum()) for mask in keep.values())))

    allocator.on_allocate.append(listen)
    train(model, allocator, optimizer, range(steps))
    allocator.finalize()
    assert seen and all(budget == kept for budget, kept in seen)
    assert allocator.live == config.target_r * len(model.layers)
    with tempfile.TemporaryDirectory() as folder:
        assert adalora.save_adapter(model, Path(folder) / "adapter") == 0.0
        loaded = adalora.load_adapter(copy.deepcopy(base), Path(folder) / "adapter")
        assert {n: m.capacity for n, m in named_adapters(loaded)} == {n: m.rank for n, m in named_adapters(model)}
    tolerance = 1e-5 if base.layers[0].weight.dtype.itemsize >= 4 else 2e-2
    assert float((outputs(loaded) - outputs(model)).abs().max()) <= tolerance
    before = outputs(model)
    allocator.compact()
    assert float((outputs(model) - before).abs().max()) <= tolerance
    assert sum(module.capacity for _, module in named_adapters(model)) == allocator.live


@pytest.mark.slow
@SOME
@given(runs(), st.data())
def test_any_run_resumes_bit_by_bit_wherever_it_stopped(case: tuple[Odd, AdaLoraConfig, int], data: Any) -> None:
    model, config, steps = case
    stop = data.draw(st.integers(0, steps - 1))
    base = copy.deepcopy(model)

    def prepared(held: dict[str, Any] | None = None) -> tuple[Odd, Any, adalora.RankAllocator]:
        torch.manual_seed(7 if held is None else 8)
        fresh = adalora.inject(copy.deepcopy(base), config)
        if held:
            fresh.load_state_dict(held["model"])
        optimizer = torch.optim.AdamW(adalora.adapter_parameters(fresh), lr=1e-2)
        if held:
            optimizer.load_state_dict(held["optimizer"])
        return fresh, optimizer, adalora.RankAllocator(fresh, steps, compact=steps % 2 == 0).attach(optimizer)

    whole, optimizer, allocator = prepared()
    held: dict[str, Any] = {}
    for step in range(steps):
        if step == stop:
            held = copy.deepcopy({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
        train(whole, allocator, optimizer, range(step, step + 1))
    other, other_optimizer, other_allocator = prepared(held)
    train(other, other_allocator, other_optimizer, range(stop, steps))
    assert [n for n, v in whole.state_dict().items() if not torch.equal(v, other.state_dict()[n])] == []
    for one, two in zip(named_adapters(whole), named_adapters(other), strict=True):
        assert torch.equal(one[1].lora_keep, two[1].lora_keep)


@MANY
@given(st.data())
def test_a_stored_adapter_of_any_shape_and_type_is_refused_or_computes_its_formula(data: Any) -> None:
    """As anyone might write one: PEFT's format without our digests."""
    out, inner, rank = data.draw(SIDES), data.draw(SIDES), data.draw(st.integers(0, 7))
    dtypes = [*[torch.float32, torch.float64, torch.float16, torch.bfloat16], torch.int64, torch.float8_e4m3fn]
    dtype = data.draw(st.sampled_from(dtypes))
    turned = data.draw(st.booleans())
    shapes = [(rank, out), (rank,), (inner, rank)] if turned else [(rank, inner), (rank, 1), (out, rank)]
    torch.manual_seed(data.draw(st.integers(0, 9)))
    A, E, B = (torch.randn(shape).to(dtype) for shape in shapes)
    size = data.draw(st.sampled_from([rank, rank + 2]))
    keep = [index < rank for index in range(size)]
    pattern = data.draw(st.sampled_from([None, {"0.lora_E": keep}]))
    config = {"peft_type": "ADALORA", "init_r": size, "lora_alpha": 4, "rank_pattern": pattern}
    base = nn.Sequential(nn.Linear(inner, out))
    with tempfile.TemporaryDirectory() as folder:
        factors = zip(("lora_A", "lora_E", "lora_B"), (A, E, B), strict=True)
        tensors = {f"base_model.model.0.{name}": tensor for name, tensor in factors}
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        try:
            model = adalora.load_adapter(copy.deepcopy(base), folder)
        except AdaLoraError as error:
            fits = not turned and dtype.is_floating_point and size > 0
            assert not (fits and (pattern or size == rank)), str(error)
            return
    x = torch.randn(3, inner)
    with torch.no_grad():
        added = (x @ A.float().T) * E.float().view(1, -1) @ B.float().T * 4 / (size + 1e-5)
        assert float((model(x) - base(x) - added).abs().max()) <= 1e-4


@MANY
@given(
    st.lists(st.lists(st.floats(0, 2.0**99, width=32), max_size=6), min_size=1, max_size=5),
    st.integers(0, 30),
)
def test_exactly_what_is_granted_is_kept_and_nothing_better_is_dropped(scores: list[list[float]], budget: int) -> None:
    parts = [torch.tensor(row, dtype=torch.float32) for row in scores]
    total = sum(len(row) for row in scores)
    keeps = keep_top(parts, budget, [0] * len(parts), None, 1.0) if total >= budget else None
    if keeps is None:
        return
    kept = torch.cat([part[keep] for part, keep in zip(parts, keeps, strict=True)])
    dropped = torch.cat([part[~keep] for part, keep in zip(parts, keeps, strict=True)])
    assert len(kept) == budget
    assert not len(kept) or not len(dropped) or float(kept.min()) >= float(dropped.max())


@pytest.mark.parametrize(("out", "inner"), [(1, 5), (5, 1), (1, 1)])
def test_a_matrix_with_one_row_or_column_trains_saves_and_loads(out: int, inner: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, base = nn.Sequential(nn.Linear(inner, out)), nn.Sequential(nn.Linear(inner, out))
    base.load_state_dict(model.state_dict())
    adalora.inject(model, AdaLoraConfig(target_modules=["0"], init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1))
    optimizer = torch.optim.SGD(adalora.adapter_parameters(model), lr=0.5)
    allocator = adalora.RankAllocator(model, 8).attach(optimizer)
    x = torch.randn(4, inner)
    for _ in range(8):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.live == 2
    adalora.save_adapter(model, tmp_path)
    assert float((adalora.load_adapter(base, tmp_path)(x) - model(x)).detach().abs().max()) <= 1e-6
