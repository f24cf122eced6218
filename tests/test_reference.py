"""The naive twin against vectors recorded from the authors' code, torch's own layers, and exact arithmetic.

The library is not imported: these tests are why the others may believe `reference`.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference

F64 = torch.float64

# (initial, target, tinit, tfinal, deltaT, total_step); what the authors' schedule_threshold gives at a step.
MNLI_12_TO_8 = (864, 576, 8000, 50000, 100, 85904)
MNLI_3_TO_1 = (216, 72, 8000, 50000, 100, 85904)
RTE_2_TO_1 = (144, 72, 600, 1800, 1, 3900)
SMOKE_12_TO_8 = (864, 576, 50, 100, 10, 300)
TINY_8_TO_4 = (8, 4, 10, 20, 5, 60)

RECORDED_BUDGETS = {
    MNLI_12_TO_8: {
        8000: 864, 8001: 863, 8100: 860, 10000: 806, 15000: 697, 20000: 629, 25000: 593, 30000: 578,
        35900: 576, 35904: 576, 35905: 576,
    },
    MNLI_3_TO_1: {8001: 215, 8100: 214, 10000: 187, 15000: 132, 20000: 98, 25000: 80, 30000: 73, 35900: 72},
    RTE_2_TO_1: {600: 144, 601: 143, 900: 108, 1200: 87, 1500: 76, 1800: 72, 2100: 72, 2101: 72},
    SMOKE_12_TO_8: {50: 864, 51: 858, 60: 810, 100: 661, 125: 612, 150: 586, 190: 576, 200: 576, 201: 576},
    TINY_8_TO_4: {10: 8, 11: 7, 15: 6, 20: 5, 25: 4, 39: 4, 40: 4, 41: 4},
}  # fmt: skip
RECORDED_MASKS = {
    MNLI_12_TO_8: {8000: False, 8001: False, 8100: True, 35900: True, 35904: False, 35905: True},
    RTE_2_TO_1: {600: False, 601: True},
    SMOKE_12_TO_8: {
        50: False, 51: False, 60: True, 100: True, 125: False, 150: True, 190: True, 200: True, 201: True,
    },
    TINY_8_TO_4: {10: False, 11: False, 15: True, 20: True, 25: True, 39: False, 40: True, 41: True},
}  # fmt: skip

# The paper's GLUE runs (72 matrices): initial and target totals, tinit, tfinal, deltaT, total steps.
GLUE_SCHEDULES = {
    "mnli": (216, 72, 8000, 50000, 100, 85904),
    "sst2": (144, 72, 6000, 22000, 100, 50520),
    "cola": (216, 72, 800, 3500, 10, 6700),
    "qqp": (144, 72, 8000, 25000, 100, 56855),
    "qnli": (144, 72, 2000, 8000, 100, 16370),
    "rte": (144, 72, 600, 1800, 1, 3900),
    "stsb": (144, 72, 800, 2000, 10, 4500),
}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def triplets(out_features: int, in_features: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(r, in_features), randn(r, 1), randn(out_features, r)


def orthogonal_rows(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(randn(columns, rows)).Q.T.contiguous()


def small_problem(r: int, zero_E: bool = False) -> tuple[list[dict[str, Tensor]], Any]:
    """Two matrices in a row, 5 -> 6 -> 4, fitted to random outputs."""
    modules = []
    for out_features, in_features in ((6, 5), (4, 6)):
        A, E, B = triplets(out_features, in_features, r)
        E = torch.zeros_like(E) if zero_E else E
        modules.append({"W": randn(out_features, in_features), "A": A * 0.3, "E": E, "B": B * 0.3})
    x, y = randn(8, 5), randn(8, 4)

    def loss_fn(step: int, weights: list[Tensor]) -> Tensor:
        return ((torch.tanh(x @ weights[0].T) @ weights[1].T - y) ** 2).mean()

    return modules, loss_fn


# --- Forward passes -----------------------------------------------------------------------------------------


def test_delta_weight_by_hand() -> None:
    A = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    B = torch.tensor([[1.0, -1.0], [2.0, 0.5], [0.0, 1.0]], dtype=F64)
    E = torch.tensor([[0.5], [-2.0]], dtype=F64)
    by_hand = torch.tensor([[6.5, 9.0], [-2.0, -2.0], [-6.0, -8.0]], dtype=F64)
    delta = reference.delta_weight(A, E, B, lora_alpha=16, init_r=2)
    assert torch.allclose(delta, by_hand * 16 / 2.00001, rtol=1e-15, atol=0)


def test_scaling_divides_by_the_initial_rank_plus_1e_5() -> None:
    A, E, B = triplets(7, 5, r=3)
    expected = B @ torch.diag(E[:, 0]) @ A * (32 / 12.00001)
    assert torch.allclose(reference.delta_weight(A, E, B, 32, init_r=12), expected, rtol=1e-13, atol=1e-13)


def test_pruned_triplets_do_not_change_the_scaling() -> None:
    A, E, B = triplets(7, 5, r=2)
    pruned = torch.tensor([[E[0, 0].item()], [0.0]], dtype=F64)
    first = E[0, 0] * torch.outer(B[:, 0], A[0]) * (16 / 2.00001)
    assert torch.allclose(reference.delta_weight(A, pruned, B, 16, 2), first, rtol=1e-14, atol=0)


def test_linear_forward_is_the_base_layer_plus_the_low_rank_path() -> None:
    A, E, B = triplets(7, 5, r=3)
    base = nn.Linear(5, 7, dtype=F64)
    x = randn(2, 4, 5)
    expected = base(x) + (x @ (A * E).T @ B.T) * (16 / 3.00001)
    actual = reference.linear_forward(x, base.weight, base.bias, A, E, B, 16, 3)
    assert torch.allclose(actual, expected, rtol=1e-13, atol=1e-13)
    without_bias = reference.linear_forward(x, base.weight, None, A, E, B, 16, 3)
    assert torch.allclose(without_bias, expected - base.bias, rtol=1e-13, atol=1e-13)


# torch's own layer warns that an odd 'same' padding may copy its input; the twin pads by itself.
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize(
    ("dims", "options"),
    [
        (1, {"kernel_size": 3, "stride": 2, "padding": 2}),
        (1, {"kernel_size": 4, "padding": "same", "dilation": 3}),
        (1, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
        (2, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "groups": 2}),
        (2, {"kernel_size": (2, 5), "padding": "same", "padding_mode": "reflect", "groups": 4}),
        (2, {"kernel_size": 3, "padding": "valid", "bias": False}),
        (2, {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "replicate"}),
        (2, {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}),
        (3, {"kernel_size": (1, 2, 3), "padding": (0, 1, 2), "padding_mode": "circular"}),
        (3, {"kernel_size": 2, "stride": (1, 2, 1), "padding": 1, "groups": 2}),
    ],
)
def test_conv_forward_is_torchs_layer_with_the_summed_weight(dims: int, options: dict[str, Any]) -> None:
    layer = getattr(nn, f"Conv{dims}d")(4, 8, dtype=F64, **options)
    base = layer.weight.detach().clone()
    A, E, B = triplets(8, base[0].numel(), r=3)
    x = randn(2, 4, *range(7, 7 + dims))
    actual = reference.conv_forward(
        x, base, layer.bias, A, E, B, 16, 3,
        stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups,
        padding_mode=layer.padding_mode,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight += reference.delta_weight(A, E, B, 16, 3).reshape(base.shape)
    assert torch.allclose(actual, layer(x), rtol=1e-12, atol=1e-12)


def test_conv_forward_takes_one_number_for_all_dimensions() -> None:
    weight, x = randn(8, 4, 3, 3), randn(2, 4, 9, 7)
    A, E, B = triplets(8, 36, r=2)
    one = reference.conv_forward(x, weight, None, A, E, B, 16, 2, stride=2, padding=1, dilation=2)
    pairs = {"stride": (2, 2), "padding": (1, 1), "dilation": (2, 2)}
    many = reference.conv_forward(x, weight, None, A, E, B, 16, 2, **pairs)
    assert torch.equal(one, many)


def test_embedding_forward_reads_rows_of_the_transposed_delta() -> None:
    table = randn(11, 6)
    A, E, B = triplets(6, 11, r=3)
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    low_rank = torch.nn.functional.embedding(ids, (A * E).T) @ B.T * (16 / 3.00001)
    expected = (torch.nn.functional.embedding(ids, table) + low_rank) * 2.5
    actual = reference.embedding_forward(ids, table, A, E, B, 16, 3, embed_scale=2.5)
    assert actual.shape == (2, 3, 6)
    assert torch.allclose(actual, expected, rtol=1e-13, atol=1e-13)


# --- V7 and section 1.2: regularizer ------------------------------------------------------------------------


def test_penalty_of_two_matrices_is_the_hand_mean_and_the_hand_sum() -> None:
    As = [torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64), torch.tensor([[1.0, 1.0]], dtype=F64)]
    Bs = [torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=F64), torch.tensor([[3.0]], dtype=F64)]
    # Gram - I: diag(3, 0); [1]; [[0, 1], [1, 1]]; [8]
    norms = [3.0, 1.0, 3.0**0.5, 8.0]
    assert reference.penalty(As, Bs, "norm").item() == pytest.approx(sum(norms) / 4, rel=1e-15)
    assert reference.penalty(As, Bs, "squared").item() == pytest.approx(9 + 1 + 3 + 64, rel=1e-15)


def test_penalty_gradients_match_the_closed_form() -> None:
    As, Bs = [randn(3, 7), randn(2, 5)], [randn(6, 3), randn(4, 2)]
    grads_A, grads_B = reference.penalty_gradients(As, Bs, "norm")
    squared_A, squared_B = reference.penalty_gradients(As, Bs, "squared")
    for A, normed, squared in zip(As, grads_A, squared_A, strict=True):
        error = A @ A.T - torch.eye(len(A), dtype=F64)
        assert torch.allclose(squared, 4 * error @ A, rtol=1e-12, atol=1e-12)
        assert torch.allclose(normed, 2 * error @ A / error.norm() / 4, rtol=1e-12, atol=1e-12)
    for B, normed, squared in zip(Bs, grads_B, squared_B, strict=True):
        error = B.T @ B - torch.eye(B.shape[1], dtype=F64)
        assert torch.allclose(squared, 4 * B @ error, rtol=1e-12, atol=1e-12)
        assert torch.allclose(normed, 2 * B @ error / error.norm() / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_penalty_gradient_is_zero_at_exact_orthogonality(form: str) -> None:
    A, B = torch.eye(3, 7, dtype=F64), torch.eye(6, 3, dtype=F64)
    (grad_A,), (grad_B,) = reference.penalty_gradients([A], [B], form)
    assert reference.penalty([A], [B], form).item() == 0
    assert torch.equal(grad_A, torch.zeros_like(A))
    assert torch.equal(grad_B, torch.zeros_like(B))


def test_penalty_ignores_rotations_of_orthogonal_rows() -> None:
    A, B = orthogonal_rows(4, 9), orthogonal_rows(4, 6).T
    assert reference.penalty([A], [B], "norm").item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(("width", "norm", "diagonal"), [(768, 2.40, 0.307), (3072, 0.85, 1.23)])
def test_penalty_at_the_authors_initialization(width: int, norm: float, diagonal: float) -> None:
    draws = [0.02 * randn(12, width) for _ in range(20)]
    assert (draws[0] @ draws[0].T).diagonal().mean().item() == pytest.approx(diagonal, abs=0.02)
    perfect = torch.eye(12, dtype=F64)  # contributes 0, so the mean over A and B halves the norm
    norms = [2 * reference.penalty([A], [perfect], "norm").item() for A in draws]
    assert sum(norms) / 20 == pytest.approx(norm, abs=0.02)


# --- V1 and quirk 4: schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", RECORDED_BUDGETS, ids=str)
def test_budgets_are_the_recorded_ones(schedule: tuple[int, ...]) -> None:
    recorded = RECORDED_BUDGETS[schedule]
    assert {step: reference.budget_schedule(step, *schedule)[0] for step in recorded} == recorded


@pytest.mark.parametrize("schedule", RECORDED_MASKS, ids=str)
def test_mask_flags_are_the_recorded_ones(schedule: tuple[int, ...]) -> None:
    recorded = RECORDED_MASKS[schedule]
    assert {step: reference.budget_schedule(step, *schedule)[1] for step in recorded} == recorded


@pytest.mark.parametrize("schedule", RECORDED_BUDGETS, ids=str)
def test_masks_fall_on_absolute_multiples_and_on_every_final_step(schedule: tuple[int, ...]) -> None:
    _, _, tinit, tfinal, deltaT, total = schedule
    for step in range(total):
        _, due = reference.budget_schedule(step, *schedule)
        assert due == (step > total - tfinal or (step > tinit and step % deltaT == 0)), step


@pytest.mark.parametrize("schedule", GLUE_SCHEDULES.values(), ids=GLUE_SCHEDULES.keys())
def test_budget_of_real_schedules_is_the_exact_floor_at_every_step(schedule: tuple[int, ...]) -> None:
    initial, target, tinit, tfinal, _, total = schedule
    span = total - tfinal - tinit
    for step in range(tinit + 1, total - tfinal + 1):
        exact = target + (initial - target) * (span - (step - tinit)) ** 3 // span**3
        assert reference.budget_schedule(step, *schedule)[0] == exact, step
    assert reference.budget_schedule(tinit + 1, *schedule)[0] == initial - 1


def test_budget_may_fall_one_below_an_exact_integer() -> None:
    budgets = {t: reference.budget_schedule(t, 1000, 0, 0, 0, 1, 1000)[0] for t in (300, 400, 800, 900)}
    assert budgets == {300: 342, 400: 215, 800: 7, 900: 0}
    assert [1000 * (1000 - t) ** 3 // 1000**3 for t in budgets] == [343, 216, 8, 1]


# --- V2 to V4: importance -----------------------------------------------------------------------------------


def recorded_importance(steps: int, dtype: torch.dtype = F64) -> reference.Importance:
    """V2: fixed weights, gradients doubled at the second step."""
    weights = {"A": [[1, 2], [3, 4]], "B": [[1, -1], [2, 0.5], [0, 1]], "E": [[0.5], [-2]]}
    grads = {"A": [[0.1, -0.2], [0.3, 0.1]], "B": [[0.5, 0.2], [-0.1, 0.4], [1, -0.3]], "E": [[2], [0.25]]}
    importance = reference.Importance(0.85, 0.85)
    for factor in (1, 2)[:steps]:
        for part in "AEB":
            weight = torch.tensor(weights[part], dtype=dtype)
            importance.update(f"m.{part}", weight, factor * torch.tensor(grads[part], dtype=dtype))
    return importance


def assert_flat(actual: Tensor, expected: Sequence[float]) -> None:
    assert actual.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_importance_after_one_step_is_the_recorded_one() -> None:
    importance = recorded_importance(1)
    smooth_A = [0.015, 0.06, 0.135, 0.06]
    assert_flat(importance.sensitivity("m.A"), smooth_A)
    assert_flat(importance.uncertainty("m.A"), [0.85 * value for value in smooth_A])
    assert_flat(importance.sensitivity("m.E"), [0.15, 0.075])
    assert_flat(importance.uncertainty("m.E"), [0.1275, 0.06375])


def test_importance_after_two_steps_is_the_recorded_one() -> None:
    importance = recorded_importance(2)
    assert_flat(importance.sensitivity("m.A"), [0.04275, 0.171, 0.38475, 0.171])
    assert_flat(importance.uncertainty("m.A"), [0.034425, 0.1377, 0.309825, 0.1377])
    assert_flat(importance.sensitivity("m.B"), [0.21375, 0.0855, 0.0855, 0.0855, 0, 0.12825])
    assert_flat(importance.uncertainty("m.B"), [0.172125, 0.06885, 0.06885, 0.06885, 0, 0.103275])
    assert_flat(importance.sensitivity("m.E"), [0.4275, 0.21375])
    assert_flat(importance.uncertainty("m.E"), [0.34425, 0.172125])


def test_triplet_scores_and_threshold_are_the_recorded_ones() -> None:
    exact = [0.173902190625, 0.116507109375]  # the same recursion in rational arithmetic, with 0.85 = 17/20
    scores = reference.importance_scores(recorded_importance(2), "m")
    assert scores == pytest.approx(exact, rel=1e-14)
    # The authors' run was in float32, where eight recorded digits hold to about two units of 1.5e-8.
    assert scores == pytest.approx([0.17390221, 0.11650712], abs=3e-8)
    assert reference.authors_threshold([scores], 1) == pytest.approx(0.11650713, abs=3e-8)
    single = reference.importance_scores(recorded_importance(2, torch.float32), "m")
    assert single == pytest.approx([0.17390221, 0.11650712], abs=5e-9)
    assert reference.authors_threshold([single], 1) == pytest.approx(0.11650713, abs=1e-8)
    E = torch.tensor([[0.5], [-2.0]], dtype=F64)
    for keep in (reference.authors_mask([scores], 1), reference.keep_top([scores], 1)):
        assert (E * torch.tensor(keep[0])[:, None]).flatten().tolist() == [0.5, 0]


def test_triplet_score_averages_a_row_of_A_and_a_column_of_B() -> None:
    sA = torch.tensor([[1.0, 2.0, 6.0], [0.0, 3.0, 3.0]], dtype=F64)
    sE = torch.tensor([[10.0], [20.0]], dtype=F64)
    sB = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [6.0, 8.0]], dtype=F64)
    assert reference.triplet_scores(sA, sE, sB) == [10 + 3 + 3, 20 + 2 + 6.5]


def test_metric_variants_use_the_smoothed_sensitivity_and_the_raw_magnitude() -> None:
    scores = reference.sensitivity_scores(recorded_importance(2), "m")
    by_hand = [
        0.4275 + (0.04275 + 0.171) / 2 + (0.21375 + 0.0855 + 0) / 3,
        0.21375 + (0.38475 + 0.171) / 2 + (0.0855 + 0.0855 + 0.12825) / 3,
    ]
    assert scores == pytest.approx(by_hand, rel=1e-12)
    assert reference.magnitude_scores(torch.tensor([[0.5], [-2.0]], dtype=F64)) == [0.5, 2.0]


def test_importance_takes_the_weight_after_the_step_and_the_penalized_gradient() -> None:
    modules, loss_fn = small_problem(r=3)
    leaves = [{part: module[part].clone().requires_grad_() for part in "AEB"} for module in modules]
    deltas = [reference.delta_weight(t["A"], t["E"], t["B"], 16, 3) for t in leaves]
    orthogonality = reference.penalty([t["A"] for t in leaves], [t["B"] for t in leaves], "norm")
    loss = loss_fn(0, [module["W"] + delta for module, delta in zip(modules, deltas, strict=True)])
    (loss + 0.5 * orthogonality).backward()
    run = reference.train_reference(
        modules, loss_fn, lora_alpha=16, init_r=3, target=6, tinit=0, tfinal=0, deltaT=1, total_step=1,
        lr=0.1, optimizer="sgd", orth_reg_weight=0.5,
    )  # fmt: skip
    for m, t in enumerate(leaves):
        for part, before in t.items():
            after = before.detach() - 0.1 * before.grad
            raw = (after * before.grad).abs()
            assert torch.allclose(getattr(run, part)[0][m], after, rtol=1e-13, atol=1e-15)
            assert torch.allclose(run.importance.sensitivity(f"{m}.{part}"), 0.15 * raw, rtol=1e-12, atol=0)
            assert not torch.allclose(raw, (before * before.grad).abs(), rtol=1e-3)


# --- V3 and quirks 1 to 3: choosing triplets ----------------------------------------------------------------


def test_authors_threshold_prunes_all_ties_and_keep_top_only_the_last_ones() -> None:
    scores = [[1, 1, 1, 2], [3, 4, 5, 6]]
    assert reference.authors_threshold(scores, 6) == 1
    assert reference.authors_mask(scores, 6) == [[False, False, False, True], [True] * 4]
    assert reference.keep_top(scores, 6) == [[True, False, False, True], [True] * 4]


def test_equal_scores_lose_everything_under_the_authors_rule_only() -> None:
    scores = [[2.0] * 4, [2.0] * 4]
    assert reference.authors_mask(scores, 5) == [[False] * 4, [False] * 4]
    assert reference.keep_top(scores, 5) == [[True] * 4, [True, False, False, False]]


def test_full_budget_fails_under_the_authors_rule_and_keeps_everything_here() -> None:
    scores = [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(RuntimeError, match="kthvalue"):
        reference.authors_mask(scores, 4)
    assert reference.keep_top(scores, 4) == [[True, True], [True, True]]
    assert reference.keep_top(scores, 0) == [[False, False], [False, False]]


def test_nan_survives_the_authors_rule_and_is_refused_here() -> None:
    scores = [[float("nan"), 1.0, 2.0, 3.0]]
    assert reference.authors_mask(scores, 2) == [[True, False, False, True]]
    with pytest.raises(ValueError, match="finite"):
        reference.keep_top(scores, 2)


def test_both_rules_agree_without_ties() -> None:
    scores = [randn(5).tolist(), randn(3), randn(7).tolist()]
    for budget in range(15):
        keeps = reference.keep_top(scores, budget)
        assert keeps == reference.authors_mask(scores, budget)
        assert sum(map(sum, keeps)) == budget


def test_minimum_is_served_from_each_modules_best_before_the_global_order() -> None:
    scores = [[9.0, 8.0, 7.0], [1.0, 3.0, 2.0], [5.0]]
    assert reference.keep_top(scores, 4) == [[True] * 3, [False] * 3, [True]]
    assert reference.keep_top(scores, 4, minimum=1) == [[True, True, False], [False, True, False], [True]]
    assert reference.keep_top(scores, 4, minimum=[0, 2, 0]) == [
        [True, True, False], [False, True, True], [False],
    ]  # fmt: skip
    assert reference.keep_top(scores, 6, minimum=2) == [[True] * 3, [False, True, True], [True]]
    with pytest.raises(ValueError, match="below the 5"):
        reference.keep_top(scores, 4, minimum=2)


# --- Optimizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_hand_written_optimizers_follow_torch(name: str) -> None:
    ours, theirs = randn(4, 3), nn.Parameter(torch.empty(4, 3, dtype=F64))
    theirs.data.copy_(ours)
    if name == "adamw":
        rule = reference.AdamW(0.05, (0.8, 0.95), 1e-6, 0.1)
        optimizer = torch.optim.AdamW([theirs], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    else:
        rule = reference.SGD(0.05)
        optimizer = torch.optim.SGD([theirs], lr=0.05)
    for _ in range(30):
        theirs.grad = randn(4, 3)
        rule.step("w", ours, theirs.grad)
        optimizer.step()
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


# --- V5, V6, quirk 5: whole runs ----------------------------------------------------------------------------

REGROWTH = {
    "lora_alpha": 16, "init_r": 4, "target": 2, "tinit": 2, "tfinal": 10, "deltaT": 4, "total_step": 40,
}  # fmt: skip


def live(run: reference.Trajectory) -> list[int]:
    return [sum(int((E != 0).sum()) for E in Es) for Es in run.E]


def test_at_initialization_only_E_has_a_task_gradient() -> None:
    modules, loss_fn = small_problem(r=3, zero_E=True)
    run = reference.train_reference(
        modules, loss_fn, lora_alpha=16, init_r=3, target=6, tinit=0, tfinal=0, deltaT=1, total_step=1,
        lr=1.0, optimizer="sgd", orth_reg_weight=0.0,
    )  # fmt: skip
    for m, module in enumerate(modules):
        assert torch.equal(run.A[0][m], module["A"])
        assert torch.equal(run.B[0][m], module["B"])
        assert (run.E[0][m] != 0).all()
    penalized = reference.train_reference(
        modules, loss_fn, lora_alpha=16, init_r=3, target=6, tinit=0, tfinal=0, deltaT=1, total_step=1,
        lr=1.0, optimizer="sgd", orth_reg_weight=0.1,
    )  # fmt: skip
    As, Bs = [module["A"] for module in modules], [module["B"] for module in modules]
    grads_A, grads_B = reference.penalty_gradients(As, Bs, "norm")
    for m, module in enumerate(modules):
        assert torch.allclose(penalized.A[0][m], module["A"] - 0.1 * grads_A[m], rtol=1e-13, atol=1e-15)
        assert torch.allclose(penalized.B[0][m], module["B"] - 0.1 * grads_B[m], rtol=1e-13, atol=1e-15)
        assert torch.equal(penalized.E[0][m], run.E[0][m])


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e-2), ("adamw", 1e-2)])
def test_pruned_values_regrow_between_masks_and_stay_down_at_the_end(optimizer: str, lr: float) -> None:
    modules, loss_fn = small_problem(r=4)
    run = reference.train_reference(modules, loss_fn, optimizer=optimizer, lr=lr, **REGROWTH)
    recorded = {4: 6, 8: 4, 12: 3, 16: 2, 20: 2, 24: 2, 28: 2}
    expected = [recorded.get(step, 8) if step < 30 else 2 for step in range(40)]
    assert live(run) == expected
    assert run.masked == [step in recorded or step >= 30 for step in range(40)]
    assert [run.budgets[step] for step in recorded] == list(recorded.values())
    assert run.budgets[:3] == [8, 8, 8] and run.budgets[30:] == [2] * 10


def test_final_choice_is_made_once_from_importance_frozen_before_it() -> None:
    modules, loss_fn = small_problem(r=4)
    run = reference.train_reference(modules, loss_fn, optimizer="adamw", lr=1e-2, **REGROWTH)
    assert [step for step, scores in enumerate(run.scores) if scores is not None] == [
        4,
        8,
        12,
        16,
        20,
        24,
        28,
        30,
    ]
    assert run.scores[30] == [reference.importance_scores(run.importance, str(m)) for m in range(2)]
    # Step 30 is no multiple of deltaT = 4: the authors would first mask at 31, from these same scores.
    assert reference.budget_schedule(30, 8, 2, 2, 10, 4, 40) == (2, False)
    assert reference.authors_mask(run.scores[30], 2) == run.keeps[30]
    assert run.keeps[30:] == [run.keeps[30]] * 10


def test_importance_of_the_final_phase_is_not_taken() -> None:
    modules, loss_fn = small_problem(r=4)
    run = reference.train_reference(modules, loss_fn, lr=1e-2, **REGROWTH)
    shorter = REGROWTH | {"tfinal": 0, "total_step": 30}
    until_30 = reference.train_reference(modules, loss_fn, lr=1e-2, **shorter)
    for name in ("0.A", "0.E", "0.B", "1.A", "1.E", "1.B"):
        assert torch.equal(run.importance.sensitivity(name), until_30.importance.sensitivity(name))
        assert torch.equal(run.importance.uncertainty(name), until_30.importance.uncertainty(name))


def test_final_choice_without_a_final_phase_is_made_at_the_last_step() -> None:
    modules, loss_fn = small_problem(r=4)
    run = reference.train_reference(
        modules,
        loss_fn,
        lora_alpha=16,
        init_r=4,
        target=2,
        tinit=1,
        tfinal=0,
        deltaT=100,
        total_step=6,
        lr=1e-2,
    )
    assert live(run) == [8, 8, 8, 8, 8, 2]
    assert run.masked == [False] * 5 + [True]
    assert run.budgets[5] == 2
    # The schedule alone would still grant all 8 at this run's last step.
    options = REGROWTH | {"tinit": 1, "tfinal": 0, "deltaT": 1, "total_step": 2}
    short = reference.train_reference(modules, loss_fn, lr=1e-2, **options)
    assert reference.budget_schedule(1, 8, 2, 1, 0, 1, 2) == (8, False)
    assert live(short) == short.budgets == [8, 2]


def test_masking_zeroes_E_and_nothing_else() -> None:
    modules, loss_fn = small_problem(r=4)
    masked = reference.train_reference(modules, loss_fn, optimizer="adamw", lr=1e-2, **REGROWTH)
    never = REGROWTH | {"deltaT": 1000}
    untouched = reference.train_reference(modules, loss_fn, optimizer="adamw", lr=1e-2, **never)
    for m in range(2):
        assert torch.equal(masked.A[4][m], untouched.A[4][m])
        assert torch.equal(masked.B[4][m], untouched.B[4][m])
        keep = torch.tensor(masked.keeps[4][m])[:, None]
        assert torch.equal(masked.E[4][m], untouched.E[4][m] * keep)


def test_adam_moments_revive_a_pruned_value_without_any_gradient() -> None:
    E, grad = torch.tensor([[0.5], [-2.0]], dtype=F64), torch.tensor([[2.0], [0.25]], dtype=F64)
    adam, sgd = reference.AdamW(0.1, (0.9, 0.999), 1e-8, 0.0), reference.SGD(0.1)
    E_adam, E_sgd = E.clone(), E.clone()
    for rule, value in ((adam, E_adam), (sgd, E_sgd)):
        rule.step("E", value, grad)
        value[1, 0] = 0
        rule.step("E", value, torch.zeros_like(grad))
    mean_hat, square_hat = 0.9 * 0.1 * 0.25 / (1 - 0.9**2), 0.999 * 0.001 * 0.25**2 / (1 - 0.999**2)
    assert E_adam[1, 0].item() == pytest.approx(-0.1 * mean_hat / (square_hat**0.5 + 1e-8), rel=1e-12)
    assert E_sgd[1, 0].item() == 0


def test_equal_budgets_train_plain_svd_lora_as_torch_would() -> None:
    modules, loss_fn = small_problem(r=3)
    run = reference.train_reference(
        modules, loss_fn, lora_alpha=16, init_r=3, target=6, tinit=2, tfinal=5, deltaT=3, total_step=20,
        lr=1e-2, weight_decay=0.01, orth_reg_weight=0.3, orth_reg_form="squared",
    )  # fmt: skip
    leaves = [{part: nn.Parameter(module[part].clone()) for part in "AEB"} for module in modules]
    optimizer = torch.optim.AdamW([p for t in leaves for p in t.values()], lr=1e-2, weight_decay=0.01)
    for step in range(20):
        deltas = [t["B"] @ (t["E"] * t["A"]) * (16 / 3.00001) for t in leaves]
        loss = loss_fn(step, [module["W"] + delta for module, delta in zip(modules, deltas, strict=True)])
        errors = [t["A"] @ t["A"].T - torch.eye(3, dtype=F64) for t in leaves]
        errors += [t["B"].T @ t["B"] - torch.eye(3, dtype=F64) for t in leaves]
        orthogonality = sum((error**2).sum() for error in errors)
        optimizer.zero_grad()
        (loss + 0.3 * orthogonality).backward()
        optimizer.step()
        assert run.losses[step] == pytest.approx(loss.item(), rel=1e-10)
        assert run.penalties[step] == pytest.approx(orthogonality.item(), rel=1e-10)
        for m, t in enumerate(leaves):
            for part, tensor in t.items():
                assert torch.allclose(getattr(run, part)[step][m], tensor, rtol=1e-9, atol=1e-11)
    assert live(run) == [6] * 20


@pytest.mark.parametrize("metric", ["sensitivity*uncertainty", "sensitivity", "magnitude"])
def test_every_metric_keeps_its_own_best_scores(metric: str) -> None:
    modules, loss_fn = small_problem(r=4)
    run = reference.train_reference(modules, loss_fn, lr=1e-2, importance=metric, minimum=1, **REGROWTH)
    for step, scores in enumerate(run.scores):
        if scores is not None:
            assert run.keeps[step] == reference.keep_top(scores, run.budgets[step], minimum=1)
            assert min(map(sum, run.keeps[step])) >= 1
    if metric == "magnitude":
        for scores, keep, E in zip(run.scores[30], run.keeps[30], run.E[30], strict=True):
            kept = [score if flag else 0.0 for score, flag in zip(scores, keep, strict=True)]
            assert kept == E.abs().flatten().tolist()


def test_training_leaves_its_inputs_alone_and_repeats_itself() -> None:
    modules, loss_fn = small_problem(r=4)
    before = [{key: tensor.clone() for key, tensor in module.items()} for module in modules]
    first = reference.train_reference(modules, loss_fn, lr=1e-2, **REGROWTH)
    second = reference.train_reference(modules, loss_fn, lr=1e-2, **REGROWTH)
    assert first.losses == second.losses and first.losses[-1] < first.losses[0]
    for module, copy in zip(modules, before, strict=True):
        assert all(torch.equal(module[key], copy[key]) for key in copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_step": 12}, "must exceed"),
        ({"optimizer": "adam"}, "'adam'"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "without decay"),
        ({"orth_reg_form": "paper"}, "'paper'"),
        ({"importance": "mag"}, "'mag'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    modules, loss_fn = small_problem(r=4)
    with pytest.raises(ValueError, match=message):
        reference.train_reference(modules, loss_fn, **({"lr": 1e-2} | REGROWTH | options))
