"""A sample of `python -m benchmarks.kills`: runs killed at random moments end as one that was left alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from benchmarks import board, kills, loops
from benchmarks.world import preload


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        pytest.param("plain loop", 3, marks=pytest.mark.slow),
        pytest.param("plain loop, compacting", 4, marks=pytest.mark.slow),
        pytest.param("Accelerate", 4, marks=pytest.mark.slow),
        pytest.param("Trainer", 4, marks=pytest.mark.slow),
    ],
)
def test_runs_killed_at_random_moments_end_as_one_that_was_left_alone(kind: str, count: int, tmp_path: Path) -> None:
    if kind in ("Trainer", "Accelerate"):
        preload()
    record = kills.series(kind, count, seed=5, world=tmp_path)
    assert record["kills"] == count
    assert record["different"] == 0
    assert sum(record["places"].get(phase, 0) for phase in ("warmup", "reduction", "final")) >= count - 1


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_keeps_the_one_before(tmp_path: Path) -> None:
    """Nothing of a torn file is ever under its name, whenever the kill comes."""
    chance = random.Random(2)
    for place in (8, 50):
        where = kills.kill(loops.plain, tmp_path / "run", place, chance, within_write=True)
        assert where is not None and "while writing" in where
        held = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["place"]
        assert held % loops.CHECKPOINT_EVERY == 0 and place + 1 - loops.CHECKPOINT_EVERY <= held


def test_the_comparison_sees_one_bit() -> None:
    state = {"a": [torch.ones(3), {"b": 1.5}], "c": "text"}
    assert kills.same(state, {"a": [torch.ones(3), {"b": 1.5}], "c": "text"})
    other = {"a": [torch.ones(3), {"b": 1.5}], "c": "text"}
    other["a"][0][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert not kills.same(state, other)
    assert not kills.same(state, {"a": [torch.ones(3), {"b": 1.5}]})
    assert not kills.same([1, 2], [1, 2, 3]) and not kills.same(torch.ones(2), torch.ones(2).double())


def test_places_are_told_by_phase() -> None:
    assert kills.words(1, False) == ["warmup", "between micro-batches"]
    assert kills.words(2 * board.SCHEDULE["tinit"] + 2, True) == ["reduction", "while writing"]
    assert kills.words(2 * board.STEPS - 2, False) == ["final"]
    assert kills.words(2 * board.STEPS, True) == ["after the last step", "while writing"]
