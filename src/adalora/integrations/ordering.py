"""The order of the training rows as a matter of the seed alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback


class SameOrder(TrainerCallback):
    """Seeds each epoch anew, so that no random number a method draws changes the order of the rows.

    For any Trainer, which draws an epoch's order right behind `on_epoch_begin`, from torch's global generator. Runs
    that differ in their method alone see equal batches in equal order. A run resumed within an epoch goes on in the
    epoch's own order; the Trainer alone would draw another one, and show some rows twice and others never.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The order is drawn next; `state.epoch` is a fraction where a run is resumed within an epoch."""
        _seed(args.seed, int(state.epoch))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Behind the last step of an epoch, have a checkpoint store what the next order is drawn from.

        A run resumed from it takes that up behind `on_epoch_begin`.
        """
        if float(state.epoch).is_integer():
            _seed(args.seed, int(state.epoch))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same, as an evaluation draws numbers in front of the checkpoint."""
        self.on_step_end(args, state, control)


def _seed(run: int, epoch: int) -> None:
    """A seed of run and epoch."""
    draws = torch.randint(2**31, (epoch + 1,), generator=torch.Generator().manual_seed(run))
    torch.manual_seed(int(draws[-1]))
