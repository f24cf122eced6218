"""The orthogonality regularizer: closed form, autograd, twin, and its place in the training step."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adalora
import reference
from adalora.injection import named_adapters
from adalora.regularizer import penalty, penalty_gradients

F64 = torch.float64
FORMS = ("norm", "squared")


def matrices(generator: torch.Generator, shapes: list[tuple[int, int]]) -> list[Tensor]:
    return [torch.randn(*shape, generator=generator, dtype=F64) for shape in shapes]


def orthogonal_rows(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows, dtype=F64)).Q.T.contiguous()


pairs = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(sizes=pairs, seed=st.integers(0, 2**31))
def test_closed_form_equals_autograd_and_twin(form: Any, sizes: list[tuple[int, int, int]], seed: int) -> None:
    """Matrices of mixed shapes, narrower and wider than their rank."""
    generator = torch.Generator().manual_seed(seed)
    As = matrices(generator, [(r, in_) for r, in_, _ in sizes])
    Bs = matrices(generator, [(out, r) for r, _, out in sizes])
    rows = [matrix for A, B in zip(As, Bs, strict=True) for matrix in (A, B.T)]
    torch.testing.assert_close(penalty(rows, form), reference.penalty(As, Bs, form), rtol=1e-12, atol=1e-12)
    gradients = penalty_gradients(rows, form)
    twin_A, twin_B = reference.penalty_gradients(As, Bs, form)
    for index, (gradient_A, gradient_B) in enumerate(zip(twin_A, twin_B, strict=True)):
        torch.testing.assert_close(gradients[2 * index], gradient_A, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(gradients[2 * index + 1], gradient_B.T, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_zero_where_rows_are_exactly_orthonormal(form: Any) -> None:
    """V7: and not NaN, which the derivative of a square root at 0 would give."""
    exact = torch.eye(5, dtype=F64)[:3]
    other = torch.randn(3, 5, dtype=F64)
    gradients = penalty_gradients([exact, other], form)
    assert not gradients[0].any()
    assert gradients[1].isfinite().all()
    assert gradients[1].any()
    assert float(penalty([exact], form)) == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_gradient_near_orthonormal_rows_is_finite(form: Any) -> None:
    matrix = orthogonal_rows(3, 5).float()
    [gradient] = penalty_gradients([matrix], form)
    assert gradient.isfinite().all()


def test_norm_is_a_mean_of_unsquared_norms_and_squared_a_sum() -> None:
    """V7, by hand: ‖diag(3, 0)‖ = 3 of A, ‖(0)‖ = 0 and ‖(3)‖ = 3 of the others."""
    A = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64)
    rows = [
        A,
        torch.tensor([[1.0]], dtype=F64),
        torch.tensor([[2.0]], dtype=F64),
        torch.tensor([[0.6, 0.8]], dtype=F64),
    ]
    assert float(penalty(rows, "norm")) == pytest.approx((3 + 0 + 3 + 0) / 4)
    assert float(penalty(rows, "squared")) == pytest.approx(9 + 0 + 9 + 0)
    assert float(penalty([], "norm")) == 0.0


def test_penalty_at_the_start_is_as_measured() -> None:
    """r = 12: about 2.40 where d = 768."""
    model = adalora.inject(nn.Sequential(nn.Linear(768, 768)), adalora.AdaLoraConfig(init_r=12))
    assert float(adalora.orthogonality_penalty(model).detach()) == pytest.approx(2.40, abs=0.05)


# --- In training --------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(weight: float, form: str = "norm", **settings: Any) -> Net:
    torch.manual_seed(2)
    schedule = {"init_r": 4, "target_r": 2, "tinit": 5, "tfinal": 20, "deltaT": 4, "total_step": 60}
    return adalora.inject(
        Net().double(),
        adalora.AdaLoraConfig(orth_reg_weight=weight, orth_reg_form=form, **schedule | settings),
    )


def run(model: Net, in_loss: float, steps: int = 60, pieces: int = 1) -> list[float]:
    torch.manual_seed(3)
    x, y = torch.randn(steps, 8, 5, dtype=F64), torch.randn(steps, 8, 4, dtype=F64)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.02)
    adalora.RankAllocator(model).attach(optimizer)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(0.0)
        for inputs, targets in zip(x[step].chunk(pieces), y[step].chunk(pieces), strict=True):
            loss = (model(inputs) - targets).square().mean() / pieces
            losses[-1] += loss.detach().item()
            (loss + in_loss * adalora.orthogonality_penalty(model)).backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize(("form", "weight"), [("norm", 0.1), ("norm", 2.0), ("squared", 0.01)])
def test_hook_equals_a_penalty_in_the_loss_over_sixty_steps(form: str, weight: float) -> None:
    hooked, plain = adapted(weight, form), adapted(0.0, form)
    run(hooked, in_loss=0.0)
    run(plain, in_loss=weight)
    for (name, one), (_, other) in zip(hooked.named_parameters(), plain.named_parameters(), strict=True):
        assert float((one - other).detach().abs().max()) <= 1e-12, name
    for (_, one), (_, other) in zip(named_adapters(hooked), named_adapters(plain), strict=True):
        assert torch.equal(one.lora_keep, other.lora_keep)


def test_strength_does_not_depend_on_gradient_accumulation() -> None:
    """Peers D4: a penalty in the loss of each micro-batch doubles with their number."""
    whole, split = adapted(0.5), adapted(0.5)
    run(whole, in_loss=0.0)
    run(split, in_loss=0.0, pieces=4)
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        assert float((one - other).detach().abs().max()) <= 1e-10


@pytest.mark.parametrize("training", [True, False])
def test_no_loss_contains_the_penalty(training: bool) -> None:
    """Peers D1, D2, D3: whatever computes the loss, in training, in evaluation, and with the adapter disabled."""
    model, bare = adapted(1e6), adapted(0.0)
    x, y = torch.randn(8, 5, dtype=F64), torch.randn(8, 4, dtype=F64)
    model.train(training)
    bare.train(training)
    assert torch.equal((model(x) - y).square().mean(), (bare(x) - y).square().mean())
    with adalora.disabled(model), adalora.disabled(bare):
        assert torch.equal((model(x) - y).square().mean(), (bare(x) - y).square().mean())


def test_reported_training_losses_contain_no_penalty() -> None:
    """The first loss is that of the base model, whatever the weight."""
    assert run(adapted(100.0), 0.0, steps=60)[0] == run(adapted(0.0), 0.0, steps=60)[0]


def test_training_drives_the_penalty_down() -> None:
    model = adapted(1.0)
    before = float(adalora.orthogonality_penalty(model).detach())
    run(model, 0.0)
    assert float(adalora.orthogonality_penalty(model).detach()) < before / 5


def test_penalty_of_a_model_skips_modules_of_rank_zero_and_is_differentiable() -> None:
    model = adapted(0.1, max_rank={"first": 0}, target_r=1)
    module = model.second
    value = adalora.orthogonality_penalty(model)
    torch.testing.assert_close(value, reference.penalty([module.lora_A], [module.lora_B], "norm"))
    value.backward()
    twin_A, twin_B = reference.penalty_gradients([module.lora_A], [module.lora_B], "norm")
    torch.testing.assert_close(module.lora_A.grad, twin_A[0])
    torch.testing.assert_close(module.lora_B.grad, twin_B[0])
    assert module.lora_E.grad is None
    run(model, 0.0)
    assert (model.first.rank, model.second.rank) == (0, 2)
