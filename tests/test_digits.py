"""The plain-PyTorch demo: what its table claims, measured."""

import pytest
import torch

from adalora.tasks import digits
from adalora.tasks.digits import DigitsResult

pytestmark = pytest.mark.slow  # one run of some seconds, for all


def global_state() -> tuple[list[int], int]:
    return torch.get_rng_state().tolist(), torch.get_num_threads()


@pytest.fixture(scope="module")
def run() -> tuple[DigitsResult, bool]:
    """The result of one run, and whether it left torch's global state alone."""
    before = global_state()
    result = digits.run(seed=0)
    return result, global_state() == before


@pytest.fixture
def result(run: tuple[DigitsResult, bool]) -> DigitsResult:
    return run[0]


def test_the_run_leaves_random_state_and_thread_count_alone(run: tuple[DigitsResult, bool]) -> None:
    assert run[1]


def test_adalora_beats_the_head_alone_by_ten_points(result: DigitsResult) -> None:
    nothing, head, _, adalora = (row.accuracy for row in result.rows)
    assert nothing < 0.25
    assert adalora > head + 0.10
    assert adalora > 0.85


def test_adalora_stays_within_eight_points_of_all_weights(result: DigitsResult) -> None:
    _, _, full, adalora = (row.accuracy for row in result.rows)
    assert adalora > full - 0.08


def test_the_budget_is_met_exactly(result: DigitsResult) -> None:
    assert result.budget == 9
    assert result.report.total_rank == 9
    assert max(result.report.ranks.values()) <= digits.CONFIG.init_r
    assert [row.capacity for row in result.report.rows] == [8, 8, 8]


def test_the_table_counts_what_has_to_be_stored(result: DigitsResult) -> None:
    head = 64 * 10 + 10
    triplets = zip(result.report.rows, (64 + 128 + 1, 128 + 128 + 1, 128 + 64 + 1), strict=True)
    kept = sum(row.rank * cost for row, cost in triplets)
    full = (64 * 128 + 128) + (128 * 128 + 128) + (128 * 64 + 64) + head
    assert [row.parameters for row in result.rows] == [0, head, full, kept + head]
    assert kept + head < 0.1 * full


def test_the_table_shows_every_row(result: DigitsResult) -> None:
    lines = result.table().splitlines()
    assert len(lines) == 5
    for line, row in zip(lines[1:], result.rows, strict=True):
        assert line.startswith(row.method)
        assert f"{row.accuracy:.3f}" in line and f"{row.parameters:,}" in line


def test_no_image_is_used_twice() -> None:
    torch.manual_seed(0)
    upright, adapt, test = digits.load_splits()
    assert [len(labels) for _, labels in (upright, adapt, test)] == [957, 300, 540]
    turned_back = torch.cat([images.view(-1, 8, 8).rot90(-1, (1, 2)) for images, _ in (adapt, test)])
    everything = torch.cat([upright[0], turned_back.flatten(1)])
    assert len(torch.unique(everything, dim=0)) == 1797
