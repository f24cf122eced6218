"""What a run writes while it lasts: its recipe, one JSON line for each log and for each allocation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from .files import write_files
from .integrations.transformers import AdaLoraCallback
from .recipe import Recipe
from .runfiles import BEGUN, METRICS_FILE, RANKS_FILE


class RunRecorder(TrainerCallback):
    """Appends every log of the Trainer to metrics.jsonl and every allocation to ranks.jsonl.

    Stands last in the list of callbacks: behind `source`, whose allocator exists once training has begun, and
    behind whatever may end it; only `loggers_last` stand behind it, and get the ranks from it. The recipe is written
    when training begins: what is wrong with a schedule has shown itself before. `live` are (step, live triplets)
    after each allocation, those of a resumed run's first part included.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, source: AdaLoraCallback | None, live: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.folder, self.recipe, self.source = folder, recipe, source
        self.live = list(live)
        self._ranks: dict[str, int] = {}
        self._within_step = self._over = False
        self._evaluated = 0  # the step at which the evaluation of an epoch was brought forward

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the recipe, and listen to the allocator."""
        text = self.recipe.dump()
        write_files(self.folder, {BEGUN: lambda path: path.write_text(text, encoding="utf-8")})
        if self.source is not None and self.source.allocator is not None:
            self._ranks = {name: module.rank for name, module in self.source.allocator.modules.items()}
            self.source.allocator.on_allocate.append(self._on_allocate)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on, allocations are those of the schedule."""
        self._within_step = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the last step logged, wherever it falls between two logs, and a run that is cut short resumable."""
        self._within_step = False
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_save = True
        # Before a checkpoint, too: the loss since the last log is not in it.
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True
        # In front of the checkpoint, not behind it: a run that lost its machine in between would never have it.
        if control.should_save and args.eval_strategy == "epoch" and float(state.epoch).is_integer():
            control.should_evaluate = True
            self._evaluated = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same at the end of an epoch."""
        if control.should_save:
            control.should_log = True
        if self._evaluated == state.global_step:
            control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is evaluated later is no part of training."""
        self._over = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line for each log. Loggers behind also get the ranks, which ranks.jsonl has."""
        if self._over:
            return
        self._append(METRICS_FILE, {"step": state.global_step, **(logs or {})})
        if logs and "loss" in logs:
            logs.update({f"adalora/rank/{name}": rank for name, rank in self._ranks.items()})

    def _on_allocate(self, step: int, budget: int, keep: Mapping[str, Tensor]) -> None:
        ranks = {name: int(mask.sum()) for name, mask in keep.items()}
        self._ranks = ranks
        assert self.source is not None and self.source.allocator is not None
        spent = self.source.allocator.spent
        self.live.append((step, spent))
        # What met the budget of a run that was cut short is no part of it once it is resumed.
        forced = {} if self._within_step else {"forced": True}
        self._append(RANKS_FILE, {"step": step, "budget": budget, "spent": spent, "ranks": ranks, **forced})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
