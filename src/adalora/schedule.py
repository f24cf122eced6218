"""The budget schedule: which step belongs to which phase, and how many triplets it may keep.

Equation 14 of the paper as the authors' code has it (`RankAllocator.schedule_threshold`): the printed
equation subtracts the final phase once too often and jumps above the initial budget. Plain integers, no
torch. What a budget counts is decided in `budget`, who gets it in `allocation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from .errors import ConfigError


class Phases(Protocol):
    """What of a configuration shapes the schedule: int = steps, float = fraction of the run."""

    @property
    def total_step(self) -> int | None:
        """Length of the run."""

    @property
    def tinit(self) -> int | float:
        """Warm-up."""

    @property
    def tfinal(self) -> int | float:
        """Final phase."""

    @property
    def deltaT(self) -> int | float:
        """Between two allocations."""


class Phase(Enum):
    """Where a step lies: full budget, falling budget, or budget and pattern fixed."""

    WARMUP = "warmup"
    REDUCTION = "reduction"
    FINAL = "final"


@dataclass(frozen=True)
class Schedule:
    """Budgets of a run of `total_step` optimizer steps, which are counted from 0.

    `initial_budget` and `target_budget` are triplets, or parameters, over all matrices; `tinit`, `tfinal` and `deltaT`
    are steps. `tfinal` is a duration, not a point in time. Raises ConfigError for a schedule that cannot run.
    """

    initial_budget: int
    target_budget: int
    tinit: int
    tfinal: int
    deltaT: int
    total_step: int

    def __post_init__(self) -> None:
        if self.total_step < 1:
            raise ConfigError(f"total_step is {self.total_step}; a run has at least one optimizer step.")
        for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.tinit + self.tfinal >= self.total_step:
            raise ConfigError(
                f"tinit ({self.tinit}) and tfinal ({self.tfinal}) together must leave steps for reducing the "
                f"budget, but the run has {self.total_step} in all. Both are durations in optimizer steps; give "
                "them as fractions, such as tinit=0.1 and tfinal=0.4, to fit any length."
            )
        if not 0 <= self.target_budget <= self.initial_budget:
            raise ConfigError(
                f"the target budget of {self.target_budget} does not lie between 0 and the {self.initial_budget} that "
                "the adapter holds; lower target_r or raise init_r."
            )

    @classmethod
    def from_config(cls, config: Phases, initial_budget: int, target_budget: int, total_step: int) -> Schedule:
        """Resolve the phases of `config`, steps or fractions, against a run of `total_step` steps."""
        tinit = _steps(config.tinit, total_step, most=total_step - 1)
        tfinal = _steps(config.tfinal, total_step, most=total_step - 1 - tinit)
        deltaT = max(_steps(config.deltaT, total_step, most=total_step), 1)
        return cls(initial_budget, target_budget, tinit, tfinal, deltaT, total_step)

    @property
    def freeze_step(self) -> int:
        """First step of the final phase: the pattern that it allocates stays.

        PEFT forces the mask at `total_step - tfinal`; the authors' code does so one step later unless deltaT
        divides, with the same scores. A run without a final phase freezes at its last step, so that its
        budget is met too.
        """
        return min(self.total_step - self.tfinal, self.total_step - 1)

    @property
    def window(self) -> int:
        """Steps that a Fisher score looks back: a tenth of the reduction, but enough for an average."""
        return max((self.freeze_step - self.tinit) // 10, 10)

    def phase(self, step: int) -> Phase:
        """The phase of the 0-based optimizer step `step`."""
        if step >= self.freeze_step:
            return Phase.FINAL
        return Phase.WARMUP if step <= self.tinit else Phase.REDUCTION

    def budget(self, step: int) -> int:
        """What may be live after the 0-based optimizer step `step` (equation 14, truncated)."""
        match self.phase(step):
            case Phase.WARMUP:
                return self.initial_budget
            case Phase.FINAL:
                return self.target_budget
        # The order of these operations makes the truncation equal to the authors', bit for bit.
        left = 1 - (step - self.tinit) / (self.total_step - self.tfinal - self.tinit)
        return int(self.target_budget + (self.initial_budget - self.target_budget) * left**3)

    def allocates(self, step: int) -> bool:
        """Whether triplets are chosen anew after this step: every deltaT-th, and when the pattern freezes."""
        if step == self.freeze_step:
            return True
        return self.phase(step) is Phase.REDUCTION and step % self.deltaT == 0


def _steps(duration: int | float, total_step: int, most: int) -> int:
    """A duration in steps: as it is, or as a fraction of the run, which fits a run of any length."""
    return max(min(round(duration * total_step), most), 0) if isinstance(duration, float) else duration


def run_length(config: Phases, total_step: int | None) -> int:
    """Optimizer steps of the run, from the configuration or the caller. Raises ConfigError if neither or both say."""
    if None not in (config.total_step, total_step) and config.total_step != total_step:
        raise ConfigError(
            f"the configuration says total_step={config.total_step}, but the loop runs {total_step} steps; "
            "leave total_step out of one of them."
        )
    length = config.total_step if total_step is None else total_step
    if length is None:
        raise ConfigError(
            "how long will training be? Pass RankAllocator(model, total_step=...) in optimizer steps: "
            "batches per epoch × epochs / gradient accumulation."
        )
    return length
