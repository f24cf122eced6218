"""Budgets in triplets and in parameters, the step's scale, and the Fisher score, each against its own formula."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from benchmarks.tracer import tracing
from torch import Tensor, nn

import adalora
from adalora.budget import plan_budget
from adalora.errors import ConfigError
from adalora.fisher import SQUARES, WEIGHT
from adalora.importance import update_fisher_
from adalora.injection import adapter_config, model_budget, named_adapters
from adalora.stepsize import usual_alpha

SHAPES = {"a": (6, 5), "b": (40, 6), "c": (4, 40)}
COSTS = {"a": 12, "b": 47, "c": 45}


class Chain(nn.Module):
    """Three matrices of unequal cost, 5 → 6 → 40 → 4."""

    def __init__(self) -> None:
        super().__init__()
        for name, (out, in_) in SHAPES.items():
            setattr(self, name, nn.Linear(in_, out))

    def forward(self, x: Tensor) -> Tensor:
        for name in SHAPES:
            x = torch.tanh(getattr(self, name)(x))
        return x


def adapted(**settings: Any) -> Chain:
    torch.manual_seed(0)
    usual = {"init_r": 4, "target_r": 2, "budget": "params", "tinit": 2, "tfinal": 10, "deltaT": 3}
    return adalora.inject(Chain(), adalora.AdaLoraConfig(**usual | settings))


def train(model: nn.Module, steps: int = 40, lr: float = 0.03) -> adalora.RankAllocator:
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=lr)
    allocator = adalora.RankAllocator(model, steps).attach(optimizer)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(torch.randn(8, 5)) - torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return allocator


# --- What a budget is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({"target_r": 2}, 2 * (12 + 47 + 45)),
        ({"target_parameters": 100}, 100),
        ({"target_parameters": 0.5}, (36 + 280 + 164) // 2),  # half of all weights and biases
        ({"target_parameters": 0}, 0),
    ],
)
def test_a_target_is_an_average_rank_a_number_or_a_share_of_the_base(settings: dict[str, Any], target: int) -> None:
    budget = model_budget(adapted(**settings))
    assert (budget.unit, budget.costs, budget.initial, budget.target) == ("parameters", COSTS, 4 * 104, target)


def test_a_budget_in_triplets_counts_each_as_one() -> None:
    budget = plan_budget(adalora.AdaLoraConfig(init_r=4, target_r=2), SHAPES, dict.fromkeys(SHAPES, 4), 480)
    assert (budget.unit, set(budget.costs.values()), budget.initial, budget.target) == ("triplets", {1}, 12, 6)


def test_a_goal_above_what_the_adapter_holds_is_refused_before_anything_changes() -> None:
    with pytest.raises(ConfigError, match=r"target_parameters=417 over 3 modules .* 417 parameters .* 0 to 416"):
        adapted(target_parameters=417)
    with pytest.raises(ConfigError, match=r"target_parameters=40 .* min_rank and max_rank allow 104 to 416"):
        adapted(target_parameters=40, min_rank=1)


@pytest.mark.parametrize(("goal", "exponent"), [(0, 0.5), (11, 0.5), (12, 1.0), (100, 0.0), (101, 0.5), (416, 0.5)])
def test_no_allocation_exceeds_the_parameters_and_none_leaves_room_for_a_triplet(goal: int, exponent: float) -> None:
    model = adapted(target_parameters=goal, cost_exponent=exponent)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.03)
    allocator = adalora.RankAllocator(model, 40).attach(optimizer)
    spent: list[tuple[int, int, int]] = []

    def heard(step: int, budget: int, keep: Any) -> None:
        cost = sum(COSTS[name] * int(mask.sum()) for name, mask in keep.items())
        spare = min([COSTS[name] for name, mask in keep.items() if not mask.all()], default=1000)
        spent.append((budget, cost, spare))

    allocator.on_allocate.append(heard)
    for step in range(40):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(torch.randn(8, 5)) - torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    assert spent and all(budget - spare < cost <= budget for budget, cost, spare in spent)
    assert allocator.spent == spent[-1][1] <= goal == spent[-1][0]
    counted = sum(int(m.lora_E.count_nonzero()) * COSTS[n] for n, m in named_adapters(model))
    assert counted == allocator.spent


def test_an_adapter_with_a_budget_in_parameters_comes_back_equal_and_trains_on_within_it(tmp_path: Any) -> None:
    model = adapted(target_parameters=150)
    spent = train(model).spent
    assert adalora.save_adapter(model, tmp_path / "a") == 0
    again = adalora.load_adapter(Chain(), tmp_path / "a", trainable=True)
    assert adapter_config(again).target_parameters == 150
    allocator = train(again)
    assert allocator.schedule.initial_budget == spent and allocator.spent <= min(spent, 150)


# --- The step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(("init_r", "target_r"), [(2, 1), (8, 1), (8, 4), (4, 4)])
def test_the_first_step_moves_the_weight_as_far_as_that_of_lora(start: Any, init_r: int, target_r: int) -> None:
    """‖ΔW‖ after one step of Adam, for each triplet of those in the end: 8·η·√(out/3), as LoRA's with α/√r = 8."""
    torch.manual_seed(0)
    out, in_, lr = 192, 96, 1e-3
    config = adalora.AdaLoraConfig(
        init_r=init_r,
        target_r=target_r,
        lora_alpha=None,
        init_lora_weights=start,
        orth_reg_weight=0,
        target_modules=["0"],
    )
    model = adalora.inject(nn.Sequential(nn.Linear(in_, out)), config)
    optimizer = torch.optim.Adam(adalora.adapter_parameters(model), lr=lr)
    x = torch.randn(512, in_)
    (model(x) * torch.randn(512, out)).sum().backward()
    optimizer.step()
    (_, layer), *_ = named_adapters(model)
    moved = float(torch.linalg.matrix_norm(layer.delta_weight().detach())) / math.sqrt(init_r)
    expected = 8 / math.sqrt(target_r) * lr * math.sqrt(out / 3)
    assert moved == pytest.approx(expected, rel=0.25)


def test_alpha_is_resolved_once_and_stored_as_a_number(tmp_path: Any) -> None:
    config = adalora.AdaLoraConfig(lora_alpha=None, init_r=4, target_r=2)
    with pytest.raises(ConfigError, match="lora_alpha is not chosen yet"):
        _ = config.scaling
    model = adapted(lora_alpha=None)
    alpha = adapter_config(model).lora_alpha
    assert alpha == usual_alpha(adapter_config(model), SHAPES, 2.0) and alpha > 0
    assert all(module.scaling == alpha / (4 + 1e-5) for _, module in named_adapters(model))
    train(model)
    assert adalora.save_adapter(model, tmp_path / "a") == 0


def test_an_orthogonal_start_has_orthonormal_factors_and_no_increment() -> None:
    for name, module in named_adapters(adapted(init_lora_weights="orthogonal")):
        r = min(4, *SHAPES[name])
        assert torch.allclose(module.lora_A[:r] @ module.lora_A[:r].T, torch.eye(r), atol=1e-6)
        assert torch.allclose(module.lora_B.T[:r] @ module.lora_B[:, :r], torch.eye(r), atol=1e-6)
        assert not module.delta_weight().any()


# --- Fisher -------------------------------------------------------------------------------------------------


def test_the_fisher_average_is_the_weighted_mean_of_squares_from_its_first_step() -> None:
    beta, products = 0.9, torch.randn(6, 4, dtype=torch.float64)
    squares, weight = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for t, product in enumerate(products, 1):
        assert update_fisher_(squares, weight, product, beta).item() is True
        weights = torch.tensor([(1 - beta) * beta ** (t - 1 - i) for i in range(t)], dtype=torch.float64)
        mean = (weights.unsqueeze(1) * products[:t].square()).sum(0) / (1 - beta**t)
        torch.testing.assert_close(squares / weight, mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_changes_no_bit(bad: float) -> None:
    squares, weight = torch.rand(3), torch.rand(3)
    before = squares.clone(), weight.clone()
    assert update_fisher_(squares, weight, torch.tensor([1.0, bad, 0.0]), 0.9).item() is False
    assert torch.equal(squares, before[0]) and torch.equal(weight, before[1])


def test_half_the_fisher_score_is_the_rise_of_the_loss_without_a_triplet() -> None:
    """A Gaussian likelihood at its optimum: the loss without triplet i rises by (its output)²/2 a sample, and so does
    ½ E[(λ ∂L/∂λ)²] with labels drawn from the model."""
    torch.manual_seed(0)
    n, r = 200_000, 3
    P, _ = torch.linalg.qr(torch.randn(6, r, dtype=torch.float64))
    Q, _ = torch.linalg.qr(torch.randn(5, r, dtype=torch.float64))
    lam = torch.tensor([2.0, 0.5, 0.1], dtype=torch.float64)
    x = torch.randn(n, 5, dtype=torch.float64)
    parts = (x @ Q) * lam  # (n, r): what each triplet adds along its column of P
    noise = torch.randn(n, 6, dtype=torch.float64)
    products = -(noise @ P) * parts  # λ ∂L/∂λ of each sample, for L = ½‖y - f‖²
    rise = parts.square().mean(0) / 2
    torch.testing.assert_close(products.square().mean(0) / 2, rise, rtol=0.03, atol=0)


def test_a_run_by_fisher_keeps_two_numbers_a_triplet_and_frees_them(tmp_path: Any) -> None:
    model = adapted(importance="fisher")
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.03)
    allocator = adalora.RankAllocator(model, 40).attach(optimizer)
    values = torch.zeros(0)
    for step in range(40):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(torch.randn(8, 5)) - torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        own = {k: v for state in optimizer.state.values() for k, v in state.items() if "adalora" in str(k)}
        if step < 30:
            assert set(own) == {SQUARES, WEIGHT}
            held = sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if "adalora" in str(k))
            assert held == 2 * 12
        else:
            assert own == {}
        values = torch.cat([m.lora_E for _, m in named_adapters(model)])
    assert allocator.frozen and int(values.count_nonzero()) == allocator.live


def calls_of_an_allocating_step(matrices: int) -> int:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(matrices)))
    config = adalora.AdaLoraConfig(
        target_modules=r"\d+", init_r=3, target_r=2, tinit=0, tfinal=1, deltaT=1, importance="fisher", orth_reg_weight=0
    )
    optimizer = torch.optim.SGD(adalora.adapter_parameters(adalora.inject(model, config)), lr=0.1, foreach=True)
    adalora.RankAllocator(model, total_step=50).attach(optimizer)
    for step in range(3):
        model(torch.randn(5, 6)).square().sum().backward()
        with tracing() as tracer:
            tracer.enter("step" if step == 2 else None)  # earlier ones make what is kept
            optimizer.step()
            tracer.enter(None)
        optimizer.zero_grad()
    return tracer.calls["step"]


def test_by_fisher_scores_a_step_takes_as_many_calls_for_many_matrices_as_for_two() -> None:
    assert 20 < calls_of_an_allocating_step(2) == calls_of_an_allocating_step(9) < 100


def test_fisher_scores_are_those_of_a_naive_loop() -> None:
    model = adapted(importance="fisher", orth_reg_weight=0.3)
    optimizer = torch.optim.SGD(adalora.adapter_parameters(model), lr=0.2)
    allocator = adalora.RankAllocator(model, 40).attach(optimizer)
    beta = 1 - 1 / allocator.schedule.window
    totals = [torch.zeros(4) for _ in SHAPES]
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(torch.randn(8, 5)) - torch.randn(8, 4)).square().mean().backward()
        gradients = [m.lora_E.grad.clone().view(-1) for _, m in named_adapters(model)]  # type: ignore[union-attr]
        optimizer.step()
        for total, gradient, (_, module) in zip(totals, gradients, named_adapters(model), strict=True):
            total.mul_(beta).add_((module.lora_E.detach().view(-1) * gradient).square(), alpha=1 - beta)
    scores = allocator._attached_to.averages.scores()
    torch.testing.assert_close(scores, torch.cat(totals) / (1 - beta**3), rtol=1e-4, atol=1e-12)


# --- All of it together -------------------------------------------------------------------------------------

EVERYTHING = {
    "importance": "fisher",
    "refactor": True,
    "lora_alpha": None,
    "init_lora_weights": "orthogonal",
    "target_parameters": 150,
}


@pytest.mark.slow
def test_a_run_with_every_improvement_resumes_bit_by_bit() -> None:
    """In every phase and around an allocation; the states are those of one run, taken on its way."""
    states: dict[int, Any] = {}

    def part(model: nn.Module, steps: range, state: Any = None) -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.03)
        adalora.RankAllocator(model, 40).attach(optimizer)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            if state is None and step in (1, 5, 14, 15, 29, 35):
                states[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            torch.manual_seed(step)
            optimizer.zero_grad()
            (model(torch.randn(8, 5)) - torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = part(adapted(**EVERYTHING), range(40))
    assert len(states) == 6
    for cut, (weights, state) in states.items():
        again = adapted(**EVERYTHING)
        again.load_state_dict(weights)
        resumed = part(again, range(cut, 40), state)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), cut


def test_re_factorisation_in_a_run_leaves_singular_triplets_within_the_budget() -> None:
    model = adapted(**EVERYTHING | {"tfinal": 0})
    allocator = train(model)
    assert allocator.spent <= 150
    for _, module in named_adapters(model):
        live = module.lora_keep
        A, B = module.lora_A.detach()[live], module.lora_B.detach()[:, live]
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)
        torch.testing.assert_close(B.T @ B, torch.eye(len(A)), rtol=0, atol=1e-5)
        values = torch.linalg.svdvals(module.delta_weight().detach())[: len(A)] / module.scaling
        torch.testing.assert_close(module.lora_E.detach()[live].view(-1).sort(descending=True).values, values)


def test_a_base_module_with_a_name_like_ours_counts_as_base() -> None:
    """The share of the base model must not depend on what its modules are called."""
    from adalora.injection import base_size

    def model() -> nn.Module:
        inner = nn.ModuleDict({"lora_block": nn.Linear(6, 5), "plain": nn.Linear(6, 5)})
        return nn.ModuleDict({"net": inner})

    base = sum(p.numel() for p in model().parameters())
    adapted = adalora.inject(model(), adalora.AdaLoraConfig(target_modules=["plain"], init_r=4, target_r=2))
    assert base_size(adapted) == base
