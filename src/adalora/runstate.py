"""What of a run lives in the optimizer's first parameter group: its step, whether the pattern is final, the pattern.

Whoever checkpoints the optimizer checkpoints them. Not in the state of a parameter: an optimizer that finds any state
there takes its own for initialized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import TrainingError
from .layers import SVDAdapter

KEEP, STEP, FROZEN = "adalora_keep", "adalora_step", "adalora_frozen"


class RunState:
    """A view of `optimizer`; nothing is kept here, so that loading the optimizer's state is enough."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def _group(self) -> dict[str, Any]:
        return self._optimizer.param_groups[0]

    def begin(self, modules: Mapping[str, SVDAdapter]) -> None:
        """Write down where a run is that says nothing yet: who loads by a template, as torch.distributed.checkpoint,
        finds every entry in it.
        """
        whole = torch.ones(sum(module.init_capacity for module in modules.values()), dtype=torch.bool)
        for key, value in ((KEEP, whole), (STEP, 0), (FROZEN, False)):
            self._group.setdefault(key, value)

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return int(self._group.get(STEP, 0))

    @step.setter
    def step(self, value: int) -> None:
        self._group[STEP] = value

    @property
    def frozen(self) -> bool:
        """Whether the pattern is final."""
        return bool(self._group.get(FROZEN, False))

    def freeze(self) -> None:
        """The pattern is final."""
        self._group[FROZEN] = True

    def keep(self, pattern: Tensor) -> None:
        """Remember the pattern, bool (sum of initial capacities,)."""
        self._group[KEEP] = pattern

    def reset(self) -> None:
        """Forget the run."""
        for key in (KEEP, STEP, FROZEN):
            self._group.pop(key, None)

    def patterns(self, modules: Mapping[str, SVDAdapter]) -> list[Tensor]:
        """The pattern of each module, bool (capacity,): every triplet without one, or where it was compacted.

        Raises TrainingError if the pattern in the optimizer is not one of this adapter.
        """
        capacities = [module.init_capacity for module in modules.values()]
        whole = self._group.get(KEEP, torch.ones(sum(capacities), dtype=torch.bool))
        if whole.numel() != sum(capacities):
            raise TrainingError(
                f"the optimizer's state masks {whole.numel()} triplets, the adapter has {sum(capacities)}: this state "
                "belongs to an adapter of another size."
            )
        patterns = list(torch.split(whole, capacities))
        for index, (name, module) in enumerate(modules.items()):
            if module.capacity < module.init_capacity:
                live = int(patterns[index].sum()) if self.frozen else module.capacity  # state may come later
                if module.capacity != live:
                    raise TrainingError(
                        f"{name!r} was compacted to {module.capacity} triplets, but the optimizer's state has {live} "
                        "live ones: they are of different steps. Load both from one checkpoint."
                    )
                patterns[index] = torch.ones(live, dtype=torch.bool)
        return patterns
