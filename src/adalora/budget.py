"""What the budget counts: triplets, or the parameters that they cost, and how much there is at both ends of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .config import AdaLoraConfig
from .errors import ConfigError
from .targets import bound


@dataclass(frozen=True)
class Budget:
    """`costs` of one triplet of each matrix, and the totals `initial` and `target`, all in `unit`s.

    `minimum`: triplets that each matrix keeps in any case.
    """

    unit: str
    costs: dict[str, int]
    initial: int
    target: int
    minimum: dict[str, int]

    @property
    def rank(self) -> float:
        """Triplets a matrix in the end, as a mean by cost."""
        return self.target / sum(self.costs.values())


def plan_budget(
    config: AdaLoraConfig, shapes: Mapping[str, tuple[int, int]], capacities: Mapping[str, int], base: int
) -> Budget:
    """The budget of matrices (out, in) by name, which hold `capacities` triplets, in a model of `base` parameters.

    A triplet is a column of P, a value and a row of Q: out + in + 1 parameters.
    """
    counts_parameters = config.budget == "params"
    costs = {name: out + in_ + 1 if counts_parameters else 1 for name, (out, in_) in shapes.items()}
    goal = config.target_parameters
    if goal is None:
        goal = config.target_r * sum(costs.values())
    elif isinstance(goal, float):
        goal = int(goal * base)
    least = {name: min(bound(config.min_rank, name, 0), capacities[name]) for name in costs}
    initial = sum(cost * capacities[name] for name, cost in costs.items())
    return Budget("parameters" if counts_parameters else "triplets", costs, initial, goal, least)


def check_bounds(config: AdaLoraConfig, ranks: Mapping[str, int], budget: Budget) -> None:
    """Raise ConfigError unless min_rank and max_rank, which gives `ranks`, leave room for the target."""
    for name, most in ranks.items():
        if bound(config.min_rank, name, 0) > most:
            raise ConfigError(f"for {name!r} min_rank is {bound(config.min_rank, name, 0)}, above max_rank {most}.")
    least = sum(cost * bound(config.min_rank, name, 0) for name, cost in budget.costs.items())
    if least <= budget.target <= budget.initial:
        return
    field = "target_r" if config.target_parameters is None else "target_parameters"
    raise ConfigError(
        f"{field}={getattr(config, field)} over {len(ranks)} modules asks for {budget.target} {budget.unit} in the "
        f"end, but min_rank and max_rank allow {least} to {budget.initial}; change {field} or the bounds."
    )
