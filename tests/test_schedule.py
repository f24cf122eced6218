"""The cubic schedule against recorded values and the twin."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adalora
import reference
from adalora.errors import ConfigError
from adalora.schedule import Phase, Schedule
from test_reference import GLUE_SCHEDULES, RECORDED_BUDGETS, RECORDED_MASKS


@pytest.mark.parametrize("values", RECORDED_BUDGETS, ids=str)
def test_budgets_equal_the_recorded_vectors(values: tuple[int, ...]) -> None:
    """V1."""
    schedule = Schedule(*values)
    assert {step: schedule.budget(step) for step in RECORDED_BUDGETS[values]} == RECORDED_BUDGETS[values]


@pytest.mark.parametrize("values", RECORDED_MASKS, ids=str)
def test_allocations_equal_the_recorded_vectors_up_to_the_freeze(values: tuple[int, ...]) -> None:
    """V1, but for one documented difference: at T - tfinal the authors mask only if deltaT divides that step,
    and after it they mask anew with frozen scores; here the pattern is chosen there, once."""
    schedule = Schedule(*values)
    freeze = values[5] - values[3]
    assert schedule.freeze_step == freeze
    recorded = RECORDED_MASKS[values]
    before = {step: due for step, due in recorded.items() if step < freeze}
    assert {step: schedule.allocates(step) for step in before} == before
    assert schedule.allocates(freeze)
    assert not any(schedule.allocates(step) for step in range(freeze + 1, freeze + 50))


@pytest.mark.parametrize("values", GLUE_SCHEDULES.values(), ids=GLUE_SCHEDULES)
def test_budgets_of_the_papers_runs_equal_the_twin(values: tuple[int, ...]) -> None:
    schedule = Schedule(*values)
    for step in range(0, values[5], 17):
        assert schedule.budget(step) == reference.budget_schedule(step, *values)[0]


def test_the_budget_falls_with_the_first_step_after_warm_up() -> None:
    schedule = Schedule(864, 576, 50, 100, 10, 300)
    assert [schedule.budget(step) for step in (0, 50, 51, 199, 200, 299)] == [864, 864, 858, 576, 576, 576]
    assert [schedule.phase(step) for step in (0, 50, 51, 199, 200)] == [
        Phase.WARMUP,
        Phase.WARMUP,
        Phase.REDUCTION,
        Phase.REDUCTION,
        Phase.FINAL,
    ]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(1, 300))
    tinit = draw(st.integers(0, total - 1))
    tfinal = draw(st.integers(0, total - 1 - tinit))
    initial = draw(st.integers(0, 900))
    target = draw(st.integers(0, initial))
    return Schedule(initial, target, tinit, tfinal, draw(st.integers(1, 400)), total)


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_budgets_never_rise_start_full_and_end_on_the_target(schedule: Schedule) -> None:
    budgets = [schedule.budget(step) for step in range(schedule.total_step)]
    assert all(before >= after for before, after in itertools.pairwise(budgets))
    assert schedule.total_step == 1 or budgets[0] == schedule.initial_budget
    assert budgets[-1] == schedule.target_budget
    assert [schedule.budget(schedule.total_step + extra) for extra in range(3)] == [schedule.target_budget] * 3


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_budgets_and_allocations_equal_the_twin_before_the_final_phase(schedule: Schedule) -> None:
    values = (schedule.initial_budget, schedule.target_budget, schedule.tinit, schedule.tfinal, schedule.deltaT)
    for step in range(schedule.freeze_step):
        assert (schedule.budget(step), schedule.allocates(step)) == reference.budget_schedule(
            step, *values, schedule.total_step
        )


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_the_last_allocation_is_at_the_freeze_and_meets_the_target(schedule: Schedule) -> None:
    """Peers B4: whatever deltaT divides, also without a final phase."""
    due = [step for step in range(schedule.total_step) if schedule.allocates(step)]
    assert due[-1] == schedule.freeze_step <= schedule.total_step - 1
    assert schedule.budget(due[-1]) == schedule.target_budget
    assert all(step > schedule.tinit for step in due[:-1])
    assert [step for step in range(schedule.total_step) if schedule.phase(step) is Phase.FINAL] == list(
        range(schedule.freeze_step, schedule.total_step)
    )


REFUSED: dict[str, tuple[dict[str, int], str]] = {
    "no steps": ({"total_step": 0}, "total_step is 0; a run has at least one"),
    "phases fill the run": ({"tinit": 40, "tfinal": 60}, r"tinit \(40\) and tfinal \(60\).*has 100 in all.*fractions"),
    "phases exceed the run": ({"tinit": 200}, r"tinit \(200\) and tfinal \(20\).*has 100 in all"),
    "negative warm-up": ({"tinit": -1}, "tinit is -1; it must be at least 0"),
    "negative final phase": ({"tfinal": -1}, "tfinal is -1; it must be at least 0"),
    "no interval": ({"deltaT": 0}, "deltaT is 0; it must be at least 1"),
    "target above start": (
        {"target_budget": 9},
        "target budget of 9 does not.*the 8 that the adapter holds; lower targ",
    ),
    "negative target": ({"target_budget": -1}, "target budget of -1"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_schedules_are_refused_with_the_values(change: dict[str, int], message: str) -> None:
    """Peers B2: not an assertion without words in the middle of a run."""
    values = {"initial_budget": 8, "target_budget": 4, "tinit": 10, "tfinal": 20, "deltaT": 5, "total_step": 100}
    Schedule(**values)
    with pytest.raises(ConfigError, match=message):
        Schedule(**values | change)


def resolved(total_step: int, **phases: Any) -> tuple[int, int, int]:
    schedule = Schedule.from_config(adalora.AdaLoraConfig(**phases), 8, 4, total_step)
    return schedule.tinit, schedule.tfinal, schedule.deltaT


def test_phases_resolve_from_steps_and_from_fractions() -> None:
    assert resolved(1000) == (100, 400, 5)
    assert resolved(1000, tinit=0.25, tfinal=0.5, deltaT=0.01) == (250, 500, 10)
    assert resolved(1000, tinit=7, tfinal=9, deltaT=3) == (7, 9, 3)
    assert resolved(1000, tinit=0, tfinal=0.0, deltaT=0.0) == (0, 0, 1)


@given(
    total=st.integers(1, 3000),
    tinit=st.floats(0, 0.99, exclude_max=True),
    share=st.floats(0, 0.99, exclude_max=True),
)
def test_fractions_fit_a_run_of_any_length(total: int, tinit: float, share: float) -> None:
    """Peers B2: the same configuration for another batch size or number of devices."""
    tfinal = (1 - tinit) * share
    steps = resolved(total, tinit=tinit, tfinal=tfinal)
    assert abs(steps[0] - tinit * total) <= 1
    assert abs(steps[1] - tfinal * total) <= 1.5


def test_the_defaults_fit_a_run_of_any_length() -> None:
    for total in range(1, 500):
        tinit, tfinal, deltaT = resolved(total)
        assert abs(tinit - 0.1 * total) <= 0.5
        assert abs(tfinal - 0.4 * total) <= 0.5
        assert deltaT >= 1
