"""Equations 9 to 13 against recorded vectors and the twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from adalora.importance import entry_scores, magnitude_scores, triplet_scores, update_averages_

F64 = torch.float64
A = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
B = torch.tensor([[1.0, -1.0], [2.0, 0.5], [0.0, 1.0]], dtype=F64)
E = torch.tensor([[0.5], [-2.0]], dtype=F64)
GRADIENTS = [
    torch.tensor([[0.1, -0.2], [0.3, 0.1]], dtype=F64),
    torch.tensor([[2.0], [0.25]], dtype=F64),
    torch.tensor([[0.5, 0.2], [-0.1, 0.4], [1.0, -0.3]], dtype=F64),
]
WEIGHTS = [A, E, B]


def update(s: list[Tensor], u: list[Tensor], weights: list[Tensor], gradients: list[Tensor], *betas: float) -> None:
    for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        assert update_averages_(s[index], u[index], weight * gradient, *betas).item() is True


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_product_that_is_not_finite_changes_no_bit_of_any_average(bad: float) -> None:
    """Peers C3; nothing is read back from the device for it."""
    sensitivity, uncertainty = torch.rand(7), torch.rand(7)
    before = sensitivity.clone(), uncertainty.clone()
    product = torch.randn(7)
    product[3] = bad
    assert update_averages_(sensitivity, uncertainty, product, 0.85, 0.85).item() is False
    assert torch.equal(sensitivity, before[0]) and torch.equal(uncertainty, before[1])
    assert update_averages_(sensitivity, uncertainty, torch.ones(7), 0.85, 0.85).item() is True
    torch.testing.assert_close(sensitivity, 0.85 * before[0] + 0.15)


def zeros() -> tuple[list[Tensor], list[Tensor]]:
    return [torch.zeros_like(w) for w in WEIGHTS], [torch.zeros_like(w) for w in WEIGHTS]


def close(one: Tensor, values: list[float]) -> None:
    torch.testing.assert_close(one.flatten(), torch.tensor(values, dtype=F64), rtol=0, atol=1e-12)


def test_two_updates_give_the_recorded_averages_and_scores() -> None:
    """V2."""
    sensitivity, uncertainty = zeros()
    update(sensitivity, uncertainty, WEIGHTS, GRADIENTS, 0.85, 0.85)
    close(sensitivity[0], [0.015, 0.06, 0.135, 0.06])
    close(uncertainty[0], [0.85 * value for value in (0.015, 0.06, 0.135, 0.06)])
    close(sensitivity[1], [0.15, 0.075])
    close(uncertainty[1], [0.1275, 0.06375])
    update(sensitivity, uncertainty, WEIGHTS, [2 * g for g in GRADIENTS], 0.85, 0.85)
    close(sensitivity[0], [0.04275, 0.171, 0.38475, 0.171])
    close(uncertainty[0], [0.034425, 0.1377, 0.309825, 0.1377])
    close(sensitivity[2], [0.21375, 0.0855, 0.0855, 0.0855, 0, 0.12825])
    close(uncertainty[2], [0.172125, 0.06885, 0.06885, 0.06885, 0, 0.103275])
    close(sensitivity[1], [0.4275, 0.21375])
    close(uncertainty[1], [0.34425, 0.172125])
    entries = [entry_scores(s, u, "sensitivity*uncertainty") for s, u in zip(sensitivity, uncertainty, strict=True)]
    recorded = torch.tensor([0.17390221, 0.11650712], dtype=F64)  # in fp32
    torch.testing.assert_close(triplet_scores(*entries), recorded, rtol=0, atol=5e-8)


def test_the_first_update_is_not_bias_corrected() -> None:
    sensitivity, uncertainty = zeros()
    update(sensitivity, uncertainty, WEIGHTS, GRADIENTS, 0.9, 0.6)
    for weight, gradient, s, u in zip(WEIGHTS, GRADIENTS, sensitivity, uncertainty, strict=True):
        raw = (weight * gradient).abs()
        torch.testing.assert_close(s, 0.1 * raw)
        torch.testing.assert_close(u, 0.4 * 0.9 * raw)


def test_weights_and_gradients_are_only_read() -> None:
    copies = [value.clone() for value in WEIGHTS + GRADIENTS]
    update(*zeros(), WEIGHTS, GRADIENTS, 0.85, 0.85)
    assert all(torch.equal(one, other) for one, other in zip(WEIGHTS + GRADIENTS, copies, strict=True))


betas = st.floats(0.01, 0.99)


@settings(max_examples=50, deadline=None)
@given(beta1=betas, beta2=betas, seed=st.integers(0, 2**31), r=st.integers(1, 5), steps=st.integers(1, 4))
def test_averages_and_scores_equal_the_twin(beta1: float, beta2: float, seed: int, r: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (r, 3), "E": (r, 1), "B": (4, r)}
    draw = {part: lambda s=shape: torch.randn(*s, generator=generator, dtype=F64) for part, shape in shapes.items()}
    twin = reference.Importance(beta1, beta2)
    sensitivity, uncertainty = ([torch.zeros(s, dtype=F64) for s in shapes.values()] for _ in range(2))
    for _ in range(steps):
        weights, gradients = ({part: make() for part, make in draw.items()} for _ in range(2))
        for part in "AEB":
            twin.update(f"m.{part}", weights[part], gradients[part])
        update(sensitivity, uncertainty, [*weights.values()], [*gradients.values()], beta1, beta2)
    for index, part in enumerate("AEB"):
        torch.testing.assert_close(sensitivity[index], twin.sensitivity(f"m.{part}"), rtol=0, atol=1e-13)
        torch.testing.assert_close(uncertainty[index], twin.uncertainty(f"m.{part}"), rtol=0, atol=1e-13)
    for kind, expected in (
        ("sensitivity*uncertainty", reference.importance_scores(twin, "m")),
        ("sensitivity", reference.sensitivity_scores(twin, "m")),
    ):
        entries = [entry_scores(s, u, kind) for s, u in zip(sensitivity, uncertainty, strict=True)]
        torch.testing.assert_close(triplet_scores(*entries), torch.tensor(expected, dtype=F64), rtol=0, atol=1e-12)


def test_triplet_scores_add_means_and_not_sums() -> None:
    """Equation 9: a wide matrix must not win by its width."""
    score = triplet_scores(torch.ones(2, 100), torch.tensor([[1.0], [2.0]]), torch.ones(7, 2))
    assert score.tolist() == [3.0, 4.0]


def test_magnitude_is_the_absolute_value_of_lambda() -> None:
    values = torch.tensor([[0.5], [-2.0], [0.0]], requires_grad=True)
    score = magnitude_scores(values)
    assert score.tolist() == [0.5, 2.0, 0.0] == reference.magnitude_scores(values.detach())
    assert not score.requires_grad


@pytest.mark.parametrize("scale", [1e-6, 1e-4])
def test_small_signals_survive_in_fp32(scale: float) -> None:
    """Peers C1: the product of two averages of products is where 16 bits give 0."""
    gradients = [g.float() * scale for g in GRADIENTS]
    weights = [w.float() for w in WEIGHTS]
    sensitivity, uncertainty = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    update(sensitivity, uncertainty, weights, gradients, 0.85, 0.85)
    entries = [entry_scores(s, u, "sensitivity*uncertainty") for s, u in zip(sensitivity, uncertainty, strict=True)]
    score = triplet_scores(*entries)
    assert (score > 0).all()
    assert score[0] / score[1] == pytest.approx(float(_first_step_score()[0] / _first_step_score()[1]), rel=1e-5)


def _first_step_score() -> Tensor:
    sensitivity, uncertainty = zeros()
    update(sensitivity, uncertainty, WEIGHTS, GRADIENTS, 0.85, 0.85)
    return triplet_scores(*(s * u for s, u in zip(sensitivity, uncertainty, strict=True)))
