"""What each method computes, against formulas and loops written out by hand."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import adalora
from adalora.allocation import keep_top
from adalora.injection import named_adapters
from adalora.methods import build_method
from adalora.methods.cutting import cut_, lora_pairs
from adalora.methods.penalty import add_gradients_
from adalora.methods.prune_lora import DoubletPruner
from adalora.methods.ranks import permuted, spread
from adalora.methods.squeeze_lora import Squeezer
from adalora.methods.squeezing import singular, squeezed
from adalora.regularizer import penalty
from adalora.schedule import Schedule
from tiny import TOKENS, adapted, bert, pair, peft_warnings


def state(step: int, steps: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=steps)


def prepared(options: dict[str, Any], model: nn.Module) -> tuple[Any, Any]:
    method = build_method(options)
    with peft_warnings():
        return method, method.prepare(model)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shake(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("goal", [360, 359, 180, 181, 11, 10, 1000])
def test_spread_uses_all_that_one_more_rank_somewhere_could_use_and_no_more(goal: int) -> None:
    costs = {f"layer.{index}": [10, 20, 30][index % 3] for index in range(6)}
    ranks = spread(costs, goal)
    size = sum(rank * costs[name] for name, rank in ranks.items())
    least = min(ranks.values())
    assert max(ranks.values()) - least <= 1
    assert 0 <= goal - size < min(costs[name] for name, rank in ranks.items() if rank == least)


def test_permuted_ranks_stay_within_their_cost_and_change_place() -> None:
    costs = {f"m{index}": 10 if index % 2 else 30 for index in range(12)}
    ranks = {name: int(torch.randint(5, ())) for name in costs}
    for seed in range(20):
        dealt = permuted(ranks, costs, seed)
        assert dealt != ranks and dealt == permuted(ranks, costs, seed)
        for cost in (10, 30):
            group = [name for name in costs if costs[name] == cost]
            assert sorted(dealt[name] for name in group) == sorted(ranks[name] for name in group)
    assert len({tuple(permuted(ranks, costs, seed).values()) for seed in range(20)}) > 10
    even = dict.fromkeys(costs, 3)
    assert permuted(even, costs, 0) == even  # there is no other


def naive_doublets(history: list[list[tuple[Tensor, Tensor]]], beta: float) -> list[list[float]]:
    """Scores of each doublet of each matrix, entry by entry, from (weights, gradients) of every step."""
    scores = []
    for k in range(len(history[0]) // 2):
        (A, _), (B, _) = history[0][2 * k], history[0][2 * k + 1]
        mean_A = mean_B = dev_A = dev_B = 0.0
        for step in history:
            (A, grad_A), (B, grad_B) = step[2 * k], step[2 * k + 1]
            mean_A = beta * mean_A + (1 - beta) * (A * grad_A).abs()
            mean_B = beta * mean_B + (1 - beta) * (B * grad_B).abs()
            dev_A = beta * dev_A + (1 - beta) * ((A * grad_A).abs() - mean_A).abs()
            dev_B = beta * dev_B + (1 - beta) * ((B * grad_B).abs() - mean_B).abs()
        entries_A, entries_B = mean_A * dev_A, mean_B * dev_B
        own = []
        for i in range(len(A)):
            row = sum(float(value) for value in entries_A[i]) / A.shape[1]
            column = sum(float(value) for value in entries_B[:, i]) / B.shape[0]
            own.append(row + column)
        scores.append(own)
    return scores


@pytest.mark.parametrize("parameters", [None, 45])
def test_prune_lora_equals_a_naive_reference(parameters: int | None) -> None:
    steps = 12
    options = {"name": "prune-lora", "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 3, "beta2": 0.85}
    method, model = prepared(options | ({"parameters": parameters} if parameters else {}), pair())
    (callback,) = method.callbacks()
    assert isinstance(callback, DoubletPruner)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    together = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(None, state(0, steps), None, **together)
    start, goal = (8, 4) if parameters is None else (4 * (11 + 9), parameters)
    schedule = Schedule(start, goal, 2, 4, 3, steps)
    history: list[list[tuple[Tensor, Tensor]]] = []
    allocations = 0
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        factors = [weight for own in callback.pairs.values() for weight in (own.A, own.B)]
        if step < steps - 4:
            history.append([(p.detach().clone(), p.grad.clone()) for p in factors])  # type: ignore[union-attr]
        callback.on_optimizer_step(None, state(step, steps), None, **together)
        if not schedule.allocates(step):
            continue
        allocations += 1
        flat = sorted(
            ((-score, k, i) for k, own in enumerate(naive_doublets(history, 0.85)) for i, score in enumerate(own))
        )
        left, kept = schedule.budget(step), set()
        for _, k, i in flat:
            cost = 1 if parameters is None else (11, 9)[k]
            if cost <= left:
                kept.add((k, i))
                left -= cost
        for k, own in enumerate(callback.pairs.values()):
            for i in range(4):
                lives = (k, i) in kept
                assert bool(own.A[i].any()) is lives and bool(own.B[:, i].any()) is lives
    assert allocations == 3  # steps 3 and 6, and 8, where the pattern freezes
    masks = [keep.clone() for keep in callback.keeps]
    before = model(x)
    callback.on_train_end(None, state(steps, steps), None, **together)
    assert torch.allclose(model(x), before, atol=1e-6)
    ranks = {name: len(own.A) for name, own in lora_pairs(model).items()}
    assert [ranks.get(name, 0) for name in ("first", "second")] == [int(mask.sum()) for mask in masks]
    final = method.count(model).final
    assert final == sum(rank * (11 if name == "first" else 9) for name, rank in ranks.items())
    assert sum(ranks.values()) == 4 if parameters is None else 45 - 9 < final <= 45
    assert method.count(model).peak == 4 * 20


def test_a_matrix_without_a_rank_becomes_its_base_layer() -> None:
    _, model = prepared({"name": "squeeze-lora", "init_r": 2, "target_r": 1}, pair())
    shake(model)
    pairs = lora_pairs(model)
    base = pairs["first"].layer.get_base_layer()
    scale = pairs["second"].layer.scaling["default"]
    keep = torch.tensor([False, True])
    optimizer = torch.optim.AdamW(trained(model))
    cut_(
        model,
        {
            "first": (pairs["first"].A[:0], pairs["first"].B[:, :0]),
            "second": (pairs["second"].A[keep], pairs["second"].B[:, keep]),
        },
        optimizer,
    )
    assert model.get_base_model().first is base
    (left,) = lora_pairs(model).values()
    assert left.A.shape == (1, 5) and left.layer.scaling["default"] == scale
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in trained(model)]


@pytest.mark.parametrize("density", [True, False])
def test_squeezing_is_the_best_approximation_of_its_rank(density: bool) -> None:
    shapes = {"a": (9, 7), "b": (5, 20), "c": (6, 6)}
    costs = {name: out + in_ for name, (out, in_) in shapes.items()}
    factors = {name: (torch.randn(4, in_), torch.randn(out, 4)) for name, (out, in_) in shapes.items()}
    budget = 95
    result = squeezed(factors, costs, budget, density)
    order = []
    for name, (A, B) in factors.items():
        U, sigma, V = torch.linalg.svd(B @ A)
        own_U, own_sigma, own_V = singular(A, B)
        assert torch.allclose(own_sigma, sigma[:4], atol=1e-4)
        assert torch.allclose(own_U * own_sigma @ own_V, B @ A, atol=1e-4)
        new_A, new_B = result[name]
        k = len(new_A)
        best = U[:, :k] * sigma[:k] @ V[:k]
        assert torch.allclose(new_B @ new_A, best, atol=1e-4)
        assert float((B @ A - new_B @ new_A).square().sum()) == pytest.approx(
            float(sigma[k:].square().sum()), rel=1e-4, abs=1e-6
        )
        order += [(float(s.square()) / (costs[name] if density else 1), name) for s in sigma[:4]]
    left, ranks = budget, dict.fromkeys(shapes, 0)
    for _, name in sorted(order, reverse=True):
        if costs[name] <= left:
            left -= costs[name]
            ranks[name] += 1
    assert {name: len(A) for name, (A, _) in result.items()} == ranks
    assert sum(rank * costs[name] for name, rank in ranks.items()) <= budget


def test_squeezing_acts_once_at_its_step_and_training_goes_on_with_fresh_moments() -> None:
    method, model = prepared({"name": "squeeze-lora", "init_r": 4, "target_r": 1, "at": 0.5}, pair())
    (callback,) = method.callbacks()
    assert isinstance(callback, Squeezer)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.0)
    x, y, together = torch.randn(8, 6), torch.randint(4, (8,)), {"model": model, "optimizer": optimizer}
    callback.on_train_begin(None, state(0, 10), None, **together)
    sizes, losses = [], []
    for step in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        callback.on_optimizer_step(None, state(step, 10), None, **together)
        sizes.append(method.count(model).final)
        losses.append(float(loss.detach()))
        if step == 4:
            assert not optimizer.state
    callback.on_train_end(None, state(10, 10), None, **together)
    assert sizes[:4] == [80] * 4 and len(set(sizes[4:])) == 1 and 20 - 9 < sizes[4] <= 20
    assert {float(own["step"]) for own in optimizer.state.values()} == {5.0}
    assert losses[-1] < losses[5]
    assert method.count(model).peak == 80


@pytest.mark.parametrize("form", ["norm", "squared"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_lora_regus_gradient_equals_autograd_of_the_penalty(form: Any, weight: float) -> None:
    _, model = prepared({"name": "lora-regu", "r": 3}, pair())
    shake(model)
    factors = [(own.A, own.B) for own in lora_pairs(model).values()]
    (weight * penalty([matrix for A, B in factors for matrix in (A, B.T)], form)).backward()
    wanted = [p.grad.clone() for own in factors for p in own]  # type: ignore[union-attr]
    for own in factors:
        own[0].grad, own[1].grad = None, torch.ones_like(own[1])
    add_gradients_(factors, form, weight)
    found = [p.grad for own in factors for p in own]
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one is not None
        assert torch.allclose(one - (index % 2), other, atol=1e-5)


@pytest.mark.parametrize("name", ["lora-regu", "svd-lora"])
def test_the_regularizer_joins_in_the_optimizers_step_until_training_ends(name: str) -> None:
    method, model = prepared({"name": name, "r": 2, "orth_reg_weight": 0.5}, bert())
    shake(model)
    (callback,) = method.callbacks()
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    callback.on_train_begin(None, state(0, 2), None, model=model, optimizer=optimizer)
    if name == "svd-lora":
        factors = [(module.lora_A, module.lora_B) for _, module in named_adapters(model)]
    else:
        factors = [(own.A, own.B) for own in lora_pairs(model).values()]
    rows = [matrix for A, B in factors for matrix in (A, B.T)]
    wanted = torch.autograd.grad(0.5 * penalty(rows, "norm"), [factors[0][0], factors[0][1]])
    before = [p.detach().clone() for p in factors[0]]
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step()
        for p, old, gradient in zip(factors[0], before, wanted, strict=True):
            assert torch.allclose(old - p, gradient, atol=1e-5)
        callback.on_train_end(None, state(1, 2), None)


def test_svd_lora_computes_as_adalora_of_that_rank() -> None:
    _, model = prepared({"name": "svd-lora", "r": 3, "lora_alpha": 12}, bert())
    other = adalora.inject(
        bert(), adalora.AdaLoraConfig(init_r=3, target_r=3, lora_alpha=12, modules_to_save=["classifier"])
    )
    shake(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)


def test_static_lora_has_the_runs_ranks_and_permuted_ones_cost_the_same(tmp_path: Path) -> None:
    model = adapted(bert(), [0, 1, 2, 3, 4], modules_to_save=["classifier"])
    adalora.save_adapter(model, tmp_path / "adapter", base_model_name_or_path="x")
    ranks = {name: module.rank for name, module in named_adapters(model)}
    costs = {name: sum(module.shape) for name, module in named_adapters(model)}
    patterns = {}
    for permute in (None, 0, 1):
        for pattern in (tmp_path, tmp_path / "adapter"):  # the folder of a run, and that of an adapter
            method = build_method({"name": "static-lora", "pattern": str(pattern), "permute": permute, "r": 2})
            with peft_warnings():
                static = method.prepare(bert())
            pairs = lora_pairs(static)
            found = {name: len(own.A) for name, own in pairs.items()}
            assert {own.layer.scaling["default"] for own in pairs.values()} == {16 / 2}
            assert method.count(static).final == sum(rank * costs[name] for name, rank in ranks.items())
            assert method.count(static).head == 16 * 2 + 2
            patterns[permute] = {name: found.get(name, 0) for name in ranks}
            assert method.options()["pattern"] == ranks
            with peft_warnings():  # the resolved recipe needs the run no more
                again = build_method({"name": "static-lora", **method.options()}).prepare(bert())
            assert {name: len(own.A) for name, own in lora_pairs(again).items()} == found
    assert patterns[None] == ranks
    assert patterns[0] != ranks and patterns[1] not in (ranks, patterns[0])
    for cost in set(costs.values()):
        group = [name for name in costs if costs[name] == cost]
        assert sorted(patterns[0][name] for name in group) == sorted(ranks[name] for name in group)


def test_static_lora_scales_like_a_uniform_lora_of_its_size() -> None:
    pattern = {"bert.encoder.layer.0.output.dense": 7, "bert.encoder.layer.1.output.dense": 2}
    _, model = prepared({"name": "static-lora", "pattern": pattern}, bert())
    assert {own.layer.scaling["default"] for own in lora_pairs(model).values()} == {16 / 4}


STEPS = 14
PEFT: dict[str, Any] = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "orth_reg_weight": 0.3}


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batches() -> list[dict[str, Tensor]]:
    ids, labels = torch.randint(1, 40, (STEPS * 4, 8)), torch.randint(2, (STEPS * 4,))
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def by_hand(base: Any, start: dict[str, Tensor], rows: list[dict[str, Tensor]], **schedule: int) -> Any:
    config = peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query", "output.dense"], **PEFT | schedule)
    model = peft.get_peft_model(base, config)
    assert model.load_state_dict(start, strict=False).unexpected_keys == []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        batch = {key: torch.stack([row[key] for row in rows[4 * step : 4 * step + 4]]) for key in rows[0]}
        model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("schedule", [{}, {"tinit": 2, "tfinal": 4, "deltaT": 3}])
def test_pefts_adalora_in_a_trainer_equals_pefts_adalora_by_hand(schedule: dict[str, int], tmp_path: Path) -> None:
    base, rows = without_dropout(bert()), batches()
    options = {"name": "peft-adalora", "target_modules": ["query", "output.dense"], **PEFT, **schedule}
    method, model = prepared(options, copy.deepcopy(base))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        optim="adamw_torch",
    )
    with peft_warnings():
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=method.callbacks()).train()  # type: ignore[arg-type]
        theirs = by_hand(copy.deepcopy(base), start, rows, total_step=STEPS, **schedule)
    pattern, wanted = model.peft_config["default"].rank_pattern, theirs.peft_config["default"].rank_pattern
    assert pattern == wanted and sum(map(sum, wanted.values())) == 2 * 6
    state = theirs.state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, state[name], atol=1e-5), name
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert {name.split(".lora_")[0] for name in moved if ".lora_" in name} == {
        name.split(".lora_")[0] for name in start if ".lora_" in name
    }


def test_the_loss_of_pefts_adalora_holds_its_regularizer() -> None:
    """A PeftModel without a task type would leave it out without a word."""
    _, model = prepared({"name": "peft-adalora", **PEFT}, bert())
    rows = [p if "lora_A" in n else p.T for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    inputs = {"input_ids": TOKENS, "labels": torch.tensor([1])}
    with torch.no_grad():
        plain, whole = model.get_base_model()(**inputs).loss, model(**inputs).loss
        assert float(whole - plain) == pytest.approx(0.3 * float(penalty(rows, "norm")), rel=1e-4)
    assert whole > plain + 0.1


def test_budgets_of_pefts_adalora_in_parameters_are_spent_by_its_own_scores() -> None:
    goal, ranks = 600, {"init_r": 4, "target_r": 2}
    method, model = prepared({"name": "peft-adalora", **PEFT, **ranks, "parameters": goal}, bert())
    allocator, tuner = model.base_model.rankallocator, model.base_model.model
    assert (allocator.init_bgt, allocator.target_bgt) == (method.count(model).peak, goal)
    model(input_ids=TOKENS, labels=torch.tensor([1])).loss.backward()
    shake(model)
    allocator.update_ipt(tuner)
    pattern = allocator.mask_to_budget(tuner, goal)
    scores, costs = [], []
    parameters = dict(tuner.named_parameters())
    for name in pattern:
        parts = [allocator._element_score(name.replace("lora_E", f"lora_{part}")) for part in "AEB"]
        scores.append(parts[0].mean(1) + parts[1].view(-1) + parts[2].mean(0))
        costs.append(parts[0].shape[1] + parts[2].shape[0] + 1)
    wanted = keep_top(scores, goal, costs=costs)
    assert list(pattern.values()) == [keep.tolist() for keep in wanted]
    assert goal - min(costs) < sum(sum(keep) * cost for keep, cost in zip(pattern.values(), costs, strict=True)) <= goal
    for name, keep in pattern.items():
        assert (parameters[name] != 0).view(-1).tolist() == keep


@pytest.mark.parametrize(
    "name", ["lora", "lora-regu", "svd-lora", "prune-lora", "squeeze-lora", "peft-adalora", "houlsby", "bitfit", "full"]
)
def test_a_model_without_weights_gives_the_same_counts(name: str) -> None:
    method, counts = build_method({"name": name}), []
    for place in ("cpu", "meta"):
        with torch.device(place), peft_warnings():
            counts.append(method.count(method.prepare(bert())))
    assert counts[0] == counts[1] and counts[0].head == 16 * 2 + 2
