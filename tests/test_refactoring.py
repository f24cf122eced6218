"""Re-factorisation: the same increment as its own SVD, and an optimizer that does not notice."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from adalora import AdaLoraConfig, inject
from adalora.errors import TrainingError
from adalora.injection import adapter_parameters, named_adapters
from adalora.layers import SVDAdapter
from adalora.refactoring import refactor_

F64 = torch.float64


def layer(out: int = 9, in_: int = 12, r: int = 4, dtype: torch.dtype = F64, seed: int = 0) -> SVDAdapter:
    """One adapted matrix with factors far from orthonormal, and λ of both signs."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(in_, out, dtype=dtype))
    [(_, module)] = named_adapters(inject(model, AdaLoraConfig(init_r=r, target_r=r, target_modules=["0"])))
    with torch.no_grad():
        for factor in (module.lora_A, module.lora_E, module.lora_B):
            factor.normal_()
    return module


def kill(module: SVDAdapter, *indices: int) -> None:
    module.lora_keep[list(indices)] = False
    with torch.no_grad():
        module.lora_E[list(indices)] = 0.0


def assert_orthonormal(module: SVDAdapter, tolerance: float) -> None:
    eye = torch.eye(module.capacity, dtype=F64)
    for rows in (module.lora_A.detach().double(), module.lora_B.detach().double().T):
        assert float((rows @ rows.T - eye).abs().max()) < tolerance


def relative(new: Tensor, old: Tensor) -> float:
    return float(torch.linalg.matrix_norm(new - old) / torch.linalg.matrix_norm(old))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (F64, 1e-12)])
def test_the_increment_stays_and_its_factors_are_its_svd(dtype: torch.dtype, tolerance: float) -> None:
    for seed in range(5):
        module = layer(dtype=dtype, seed=seed)
        before = module.delta_weight().detach().double()
        refactor_([module], None)
        assert relative(module.delta_weight().detach().double(), before) < tolerance
        assert_orthonormal(module, tolerance)
        true = torch.linalg.svdvals(before)[:4] / module.scaling
        torch.testing.assert_close(
            module.lora_E.detach().double().view(-1).sort(descending=True).values,
            true,
            rtol=10 * tolerance,
            atol=float(10 * tolerance * true[0]),
        )


def test_a_second_time_changes_nothing() -> None:
    module = layer(dtype=torch.float32)
    refactor_([module], None)
    before = [p.detach().clone() for p in module.parameters()]
    refactor_([module], None)
    for old, new in zip(before, module.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=1e-6)


def test_a_triplet_stays_where_it_was_with_p_as_it_pointed() -> None:
    """Small turns only: λ of either sign, in no order, with wide gaps."""
    module = layer()
    values = torch.tensor([0.5, -4.0, 1.5, -2.5], dtype=F64)
    with torch.no_grad():
        module.lora_E.copy_(values.view(-1, 1))
        for factor in (module.lora_A, module.lora_B.T):
            noise = 0.01 * torch.randn_like(factor) / factor.shape[1] ** 0.5
            factor.copy_(torch.linalg.qr(factor.T).Q.T + noise)
    A, B = module.lora_A.detach().clone(), module.lora_B.detach().clone()
    refactor_([module], None)
    torch.testing.assert_close(module.lora_E.detach().view(-1), values.abs(), rtol=0.05, atol=0)
    assert float((module.lora_B.detach() * B).sum(0).min()) > 0.98
    assert float(((module.lora_A.detach() * A).sum(1) * values.sign()).min()) > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_at_the_start_directions_are_made_orthonormal_and_nothing_else(dtype: torch.dtype) -> None:
    """Λ = 0 has any singular vectors; those of Gram and Schmidt come out, not NaN."""
    module = layer(dtype=dtype)
    with torch.no_grad():
        module.lora_E.zero_()
    A, B = module.lora_A.detach().clone(), module.lora_B.detach().clone()
    refactor_([module], None)
    assert not module.lora_E.any()
    assert_orthonormal(module, 1e-6)
    for new, old in ((module.lora_A.detach().T, A.T), (module.lora_B.detach(), B)):
        Q, R = torch.linalg.qr(old)
        torch.testing.assert_close(new, Q * R.diagonal().sign(), rtol=0, atol=1e-5)


def test_pruned_triplets_keep_their_place_outside_the_span_of_the_live_ones() -> None:
    module, twin = layer(r=5), layer(r=5)
    kill(module, 0, 3)
    before = module.delta_weight().detach()
    live = [1, 2, 4]
    span = module.lora_B.detach()[:, live]
    refactor_([module], None)
    assert relative(module.delta_weight().detach(), before) < 1e-12
    assert module.lora_keep.tolist() == [False, True, True, False, True]
    assert module.lora_E.detach().view(-1)[[0, 3]].tolist() == [0.0, 0.0]
    assert_orthonormal(module, 1e-12)
    assert float((module.lora_B.detach()[:, [0, 3]].T @ span).abs().max()) < 1e-12
    # What the first of the dead points to is what was its own before.
    own = twin.lora_B.detach()[:, 0]
    rest = own - span @ torch.linalg.lstsq(span, own.unsqueeze(1)).solution.view(-1)
    torch.testing.assert_close(module.lora_B.detach()[:, 0], rest / rest.norm())


def test_a_pruned_triplet_that_grew_back_still_acts() -> None:
    """Between two allocations the mask is not applied, so its λ is not 0."""
    module = layer()
    module.lora_keep[1] = False
    before = module.delta_weight().detach()
    refactor_([module], None)
    assert relative(module.delta_weight().detach(), before) < 1e-12


def test_everything_pruned_and_nothing_to_do() -> None:
    module = layer()
    kill(module, 0, 1, 2, 3)
    refactor_([module], None)
    assert not module.delta_weight().any()
    assert_orthonormal(module, 1e-12)
    refactor_([], None)


@pytest.mark.parametrize(("out", "in_", "r"), [(9, 12, 1), (4, 4, 4), (3, 10, 5), (10, 3, 5), (2, 3, 7), (1, 5, 2)])
@pytest.mark.parametrize("dead", [0, 1])
def test_rank_one_and_more_triplets_than_the_matrix_has_room_for(out: int, in_: int, r: int, dead: int) -> None:
    module = layer(out, in_, r)
    kill(module, *range(min(dead, r - 1)))
    before, room = module.delta_weight().detach(), min(out, in_, r)
    refactor_([module], None)
    assert relative(module.delta_weight().detach(), before) < 1e-12
    values = module.lora_E.detach().view(-1).sort(descending=True).values
    torch.testing.assert_close(values[:room], torch.linalg.svdvals(before)[:room] / module.scaling)
    assert not values[room:].any()
    for rows in (module.lora_A, module.lora_B.T):
        torch.testing.assert_close(rows.detach().norm(dim=1), torch.ones(r, dtype=F64))
    acting = module.lora_E.detach().view(-1) > 0
    for rows in (module.lora_A.detach()[acting], module.lora_B.detach().T[acting]):
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=F64))


def test_duplicates_collapse_into_one() -> None:
    module = layer()
    with torch.no_grad():
        module.lora_A[2], module.lora_B[:, 2] = 3 * module.lora_A[0], -module.lora_B[:, 0]
    before = module.delta_weight().detach()
    refactor_([module], None)
    assert relative(module.delta_weight().detach(), before) < 1e-12
    values = module.lora_E.detach().view(-1).sort(descending=True).values
    assert float(values[3]) < 1e-13 * float(values[0]) < float(values[2])
    assert_orthonormal(module, 1e-12)


def test_a_model_of_every_kind_of_layer_keeps_its_function_and_its_padding_row() -> None:
    targets = ["embed", "conv", "grouped", "line", "linear"]
    model = tiny.adapted(tiny.net(), [3, 1, 2], init_r=3, target_r=2, target_modules=targets)
    before = model(tiny.TOKENS)
    refactor_([module for _, module in named_adapters(model)], None)
    torch.testing.assert_close(model(tiny.TOKENS), before)
    embedding = dict(named_adapters(model))["embed"]
    with torch.no_grad():
        embedding.lora_A[:, 0] = 0.0
        embedding.lora_A[2] = embedding.lora_A[1]  # rank deficient: a new direction is needed, but not that one
    refactor_([embedding], None)
    assert not embedding.lora_A[:, 0].any()


def test_stacked_modules_come_out_as_alone() -> None:
    model = tiny.adapted(tiny.bert(), [4, 2, 3, 1], init_r=4, target_r=2)
    alone = copy.deepcopy(model)
    refactor_([module for _, module in named_adapters(model)], None)
    for _, module in named_adapters(alone):
        refactor_([module], None)
    for p, q in zip(adapter_parameters(model), adapter_parameters(alone), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


# --- What the optimizer holds ---------------------------------------------------------------------------------


def gradients(module: SVDAdapter, G: Tensor) -> list[Tensor]:
    """Of ⟨G, s·ΔW⟩, for A, E, B."""
    factors = [module.lora_A, module.lora_E, module.lora_B]
    return list(torch.autograd.grad((module.delta_weight() * G).sum(), factors))


@pytest.mark.parametrize("dead", [(), (0, 3)])
def test_momentum_is_what_the_new_factors_would_have_gathered(dead: tuple[int, ...]) -> None:
    """Brute force: momentum of a constant G in the old basis, moved, is that of G in the new basis."""
    module = layer(r=5)
    kill(module, *dead)
    G = torch.randn(9, 12, dtype=F64)
    factors = [module.lora_A, module.lora_E, module.lora_B]
    optimizer = torch.optim.SGD(factors, lr=0.0, momentum=0.9)
    for _ in range(4):
        for factor, gradient in zip(factors, gradients(module, G), strict=True):
            factor.grad = gradient
        optimizer.step()
    refactor_([module], optimizer)
    total = sum(0.9**k for k in range(4))
    live = module.lora_keep
    for factor, gradient in zip(factors, gradients(module, G), strict=True):
        moved, wanted = optimizer.state[factor]["momentum_buffer"], total * gradient
        if factor is module.lora_E:
            moved, wanted = moved[live], wanted[live]  # between two with λ = 0 nothing is known
        # The damping of what is divided by λ shows in λ's own momentum only.
        rtol = 2e-3 if factor is module.lora_E else 1e-12
        torch.testing.assert_close(moved, wanted, rtol=rtol, atol=1e-10)


def test_the_next_step_is_the_same_where_factors_were_orthonormal_already() -> None:
    """To first order in the step, for the dense increment: signs and order of triplets are all that changes."""
    steps = []
    for again in (False, True):
        module = layer(r=4)
        with torch.no_grad():
            for factor in (module.lora_A, module.lora_B.T):
                factor.copy_(torch.linalg.qr(factor.T).Q.T)
        G = torch.randn(9, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
        factors = [module.lora_A, module.lora_E, module.lora_B]
        optimizer = torch.optim.SGD(factors, lr=0.0, momentum=0.9)
        for _ in range(3):
            for factor, gradient in zip(factors, gradients(module, G), strict=True):
                factor.grad = gradient
            optimizer.step()
        if again:
            refactor_([module], optimizer)
        before = module.delta_weight().detach()
        optimizer.param_groups[0]["lr"] = 1e-7
        for factor in factors:
            factor.grad = torch.zeros_like(factor)  # the step is momentum alone
        optimizer.step()
        steps.append(module.delta_weight().detach() - before)
    assert relative(steps[1], steps[0]) < 1e-5


def stepped(optimizer: torch.optim.Optimizer, number: int = 1) -> None:
    """Steps with random gradients, and the factors as they were."""
    for _ in range(number):
        for group in optimizer.param_groups:
            for factor in group["params"]:
                factor.grad = torch.randn_like(factor)
        optimizer.step()


def test_an_orthonormal_basis_keeps_its_moments() -> None:
    module = layer(r=5)
    refactor_([module], None)
    factors = [module.lora_A, module.lora_E, module.lora_B]
    optimizer = torch.optim.AdamW(factors, lr=0.0, amsgrad=True)
    stepped(optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    refactor_([module], optimizer)
    for index, factor in enumerate(factors):
        for entry in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"):
            torch.testing.assert_close(optimizer.state[factor][entry], before[index][entry], rtol=1e-6, atol=1e-10)


def test_squares_follow_the_lengths_of_the_directions() -> None:
    """Exactly, where only the lengths change: p of length 3 and q of length 2 become of length 1, λ six times it."""
    module = layer(r=3)
    refactor_([module], None)
    with torch.no_grad():
        module.lora_B.mul_(3)
        module.lora_A.mul_(2)
    G = torch.randn(9, 12, dtype=F64)
    factors = [module.lora_A, module.lora_E, module.lora_B]
    optimizer = torch.optim.Adam(factors, lr=0.0)
    for factor, gradient in zip(factors, gradients(module, G), strict=True):
        factor.grad = gradient
    optimizer.step()
    refactor_([module], optimizer)
    for factor, gradient in zip(factors, gradients(module, G), strict=True):
        torch.testing.assert_close(optimizer.state[factor]["exp_avg_sq"], 0.001 * gradient**2, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(optimizer.state[factor]["exp_avg"], 0.1 * gradient, rtol=1e-4, atol=1e-9)


def test_no_step_becomes_longer_than_adams_longest() -> None:
    """After a turn from anywhere, duplicates included: squares positive, |momentum| at most 7.3 of their roots."""
    for seed in range(5):
        module = layer(r=5, seed=seed)
        kill(module, 4)
        with torch.no_grad():
            module.lora_B[:, 1] = module.lora_B[:, 0]
        factors = [module.lora_A, module.lora_E, module.lora_B]
        optimizer = torch.optim.AdamW(factors, lr=0.0)
        stepped(optimizer, 5)
        refactor_([module], optimizer)
        for factor in factors:
            mean, square = (optimizer.state[factor][entry] for entry in ("exp_avg", "exp_avg_sq"))
            assert float(square.min()) > 0
            assert float((mean.abs() / square.sqrt()).max()) < 7.3
        assert not optimizer.state[module.lora_E]["exp_avg"].any()  # P was rank deficient: nothing is known
        assert not optimizer.state[module.lora_B]["exp_avg"][:, 4].any()


def teacher(module: SVDAdapter, x: Tensor, y: Tensor) -> Tensor:
    return (module(x) - y).square().mean()


MAKERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),  # starts anew each time
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


# From Λ = 0 with every optimizer; one triplet and another start with one optimizer of each kind of state.
@pytest.mark.parametrize(
    ("name", "r", "start"),
    [
        *((name, 4, 0.0) for name in MAKERS),
        *((name, 1, 0.0) for name in ("adamw", "fused", "sgd", "centered", "adafactor")),
        *((name, 4, 1.0) for name in ("fused", "plain", "sgd", "rmsprop", "adagrad", "adafactor")),
    ],
)
def test_fifty_steps_with_a_refactoring_every_five(name: str, r: int, start: float) -> None:
    """From Λ = 0 and from Λ far from it; the loss falls, nothing is NaN, and the pruned place stays empty."""
    module = layer(r=r, dtype=torch.float32)
    with torch.no_grad():
        module.lora_E.mul_(start)
        module.lora_A.mul_(0.3)
        module.lora_B.mul_(0.3)
    if r > 1:
        kill(module, 2)
    x = torch.randn(64, 12)
    y = x @ (torch.randn(12, 2) @ torch.randn(2, 9)) * 0.3
    factors = [module.lora_A, module.lora_E, module.lora_B]
    optimizer = MAKERS[name](factors)
    losses = []
    for step in range(50):
        optimizer.zero_grad()
        loss = teacher(module, x, y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        if r > 1:
            with torch.no_grad():
                module.lora_E[2] = 0.0
        if step % 5 == 4:
            before = module(x)
            refactor_([module], optimizer)
            torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)
            assert_orthonormal(module, 1e-6)
    assert losses[-1] < losses[0]
    for factor in factors:
        assert factor.isfinite().all()
        for value in optimizer.state[factor].values():
            assert not isinstance(value, Tensor) or value.isfinite().all()


def test_unknown_state_starts_anew_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module = layer()
    factors = [module.lora_A, module.lora_E, module.lora_B]
    optimizer = torch.optim.Adamax(factors, lr=1e-3)
    for factor in factors:
        factor.grad = torch.randn_like(factor)
    optimizer.step()
    with caplog.at_level(logging.WARNING, logger="adalora"):
        refactor_([module], optimizer)
    assert "Adamax keeps ['exp_inf']" in caplog.text
    assert not any(factor in optimizer.state for factor in factors)
    optimizer.step()
    assert all(factor.isfinite().all() for factor in factors)


def test_what_cannot_be_moved_is_refused_with_nothing_changed() -> None:
    model = tiny.adapted(tiny.pair())
    modules = [module for _, module in named_adapters(model)]
    before = tiny.snapshot(model)
    with pytest.raises(TrainingError, match="LBFGS keeps its history"):
        refactor_(modules, torch.optim.LBFGS(adapter_parameters(model)))
    tiny.assert_unchanged(model, before)
    with pytest.raises(TrainingError, match="two modules share an adapter parameter"):
        refactor_([modules[0], modules[0]], None)
    tiny.assert_unchanged(model, before)
    with torch.no_grad():
        modules[0].lora_A[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="the run has diverged"):
        refactor_(modules[:1], None)
