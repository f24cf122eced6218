"""RankAllocator: two optimizer hooks that run the method in any training loop.

Before each optimizer step the regularizer's gradient joins the others; after it, importance is updated from
the gradients that the step used and, when the schedule says so, the least important triplets are zeroed.
Everything that a resumed run needs lives in the optimizer: the averages in the state of each parameter, step
and mask in the first parameter group. So whoever checkpoints the optimizer checkpoints the method.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .allocation import keep_top
from .attachment import Attachment, claim
from .errors import ConfigError, TrainingError
from .gathering import reshard_
from .injection import Progress, adapter_config, adapter_root, model_budget, named_adapters, record_progress
from .masking import mask_
from .optimizers import once_a_step, step_is_skipped, unwrap
from .schedule import Phase, Schedule, run_length
from .verdicts import Verdicts

logger = logging.getLogger("adalora")

Listener = Callable[[int, int, Mapping[str, Tensor]], None]


class RankAllocator:
    """Distributes the budget of an adapted model over its triplets while an optimizer trains it.

        RankAllocator(model, total_step=3000).attach(optimizer)

    total_step counts optimizer steps; it may come from the configuration instead. `on_allocate` listeners
    are called as f(step, budget, {module name: bool tensor (r,)}) after each allocation. `compact` frees the
    pruned triplets as soon as the pattern is final (see `compact()`). Raises ConfigError if the length of the
    run is unknown or the schedule impossible, InjectionError without an adapter.
    """

    def __init__(self, model: nn.Module, total_step: int | None = None, *, compact: bool = False) -> None:
        self.root = adapter_root(model)
        self.config = config = adapter_config(model)
        self.modules = {name: module for name, module in named_adapters(self.root) if module.init_capacity}
        if not self.modules:
            raise ConfigError("every module has rank 0, so there is no budget to distribute; raise max_rank.")
        self._capacities = [module.init_capacity for module in self.modules.values()]
        budget = model_budget(self.root)
        self.unit, self._costs = budget.unit, [budget.costs[name] for name in self.modules]
        self.minimum = [budget.minimum[name] for name in self.modules]
        # A pruned adapter that trains on starts from the triplets that it still has.
        target = min(budget.target, budget.initial)
        self.schedule = Schedule.from_config(config, budget.initial, target, run_length(config, total_step))
        self.on_allocate: list[Listener] = []
        self._compact, self._skipped = compact, 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._verdicts = Verdicts()
        self._attachment: Attachment | None = None

    def attach(self, optimizer: Any) -> RankAllocator:
        """Run the method in every step of `optimizer`, a torch optimizer or a wrapper of one; returns self.

        Attaching again replaces the earlier hooks. State that the optimizer already holds is taken up. Raises
        TrainingError if an adapter parameter is missing from the optimizer, in it twice, frozen or 16-bit.
        """
        optimizer = unwrap(optimizer)
        claim(optimizer, self)
        self.detach()
        self._attachment = Attachment(optimizer, self, self.schedule.window)
        before, after = once_a_step(self._before_step, self._after_step)
        self._hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        self._hooks.append(optimizer.register_load_state_dict_post_hook(self._after_loading))
        self._record(self.step)
        return self

    def detach(self) -> None:
        """Stop running the method. Optimizer and adapter keep what they hold."""
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self._attached_to.run.step

    @property
    def frozen(self) -> bool:
        """Whether the pattern is final."""
        return self._attached_to.run.frozen

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._hooks)

    @property
    def phase(self) -> Phase:
        """The phase of the coming step."""
        return Phase.FINAL if self.frozen else self.schedule.phase(self.step)

    @property
    def budget(self) -> int:
        """What the schedule grants after the latest step, in `unit`s."""
        return self.schedule.target_budget if self.frozen else self.schedule.budget(max(self.step - 1, 0))

    @property
    def skipped_steps(self) -> int:
        """Steps that importance left out, because a gradient was not finite or a GradScaler skipped them."""
        self._verdicts.hear(wait=True)
        return self._skipped

    @property
    def live(self) -> int:
        """Triplets that the latest allocation left alive."""
        return sum(module.rank for module in self.modules.values())

    @property
    def spent(self) -> int:
        """What the live triplets cost, in `unit`s."""
        return sum(cost * module.rank for cost, module in zip(self._costs, self.modules.values(), strict=True))

    def finalize(self) -> None:
        """Enforce the target budget now, for good; what a run that ends early must do. No-op if it is met.

        Raises TrainingError before the first step: nothing is known of importance then.
        """
        self._verdicts.hear(wait=True)
        reshard_(self.root)
        if self.frozen:
            self._attached_to.restore()  # weights loaded since brought their own pattern
            mask_(self.modules.values())
            return
        phase, step = self.phase, self.step
        if step == 0:
            raise TrainingError("no optimizer step has run, so there is no importance to allocate ranks by.")
        self._allocate(step - 1, self.schedule.target_budget)
        self._freeze()
        logger.warning(
            "training stopped after step %d of %d, in the %s phase: the budget was enforced at once (%d of %d "
            "%s kept), without final tuning of the kept ones",
            step,
            self.schedule.total_step,
            phase.value,
            self.spent,
            self.schedule.initial_budget,
            self.unit,
        )

    def compact(self) -> None:
        """Free the pruned triplets for good: in the model, its gradients and the optimizer (see `compaction`).

        The parameters are new objects then: lists of the old ones, as kept for clipping, are stale. Raises
        TrainingError before the pattern is final, and where something cannot be cut; nothing has changed then.
        """
        if not self.frozen:
            raise TrainingError(
                f"the pattern is final after step {self.schedule.freeze_step} only, and this is step {self.step}: "
                "pruned triplets may still come back. Compact later, or call finalize() first."
            )
        self._attached_to.compact()

    def restart(self) -> None:
        """Follow the whole schedule again, with every triplet alive and importance measured anew.

        Raises TrainingError after compaction: the freed triplets are gone.
        """
        if any(module.capacity < module.init_capacity for module in self.modules.values()):
            raise TrainingError(
                "the pruned triplets were freed, so the schedule cannot start over with all of them; load the adapter "
                "into a fresh base model with load_adapter(..., trainable=True) and train that."
            )
        self._attached_to.averages.drop()
        self._attached_to.run.reset()
        self._after_loading()

    @property
    def _attached_to(self) -> Attachment:
        if self._attachment is None:
            raise TrainingError("the allocator has no optimizer yet; call attach(optimizer).")
        return self._attachment

    def _after_loading(self, *_: Any) -> None:
        self._attached_to.restore()
        self._record(self.step)

    def _record(self, step: int) -> None:
        record_progress(self.root, Progress(step, self.schedule.total_step))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._verdicts.hear()
        return self._attached_to.before_step(args, kwargs)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._attached_to.rehearsed():
            return
        if step_is_skipped(optimizer):
            self._skipped += 1
            return
        if self.frozen:
            mask_(self.modules.values())
        else:
            self._follow(self.step)
        self._attached_to.run.step += 1
        self._record(self.step)

    def _follow(self, step: int) -> None:
        if step < self.schedule.total_step - self.schedule.tfinal:
            finite = self._attached_to.averages.update()
            if finite is not None:
                self._verdicts.ask(finite, self._leave_out)
        # A resumed run may find that its new, shorter schedule has frozen already.
        if self.schedule.allocates(step) or step > self.schedule.freeze_step:
            self._allocate(step, self.schedule.budget(step))
        if step >= self.schedule.freeze_step:
            self._freeze()

    def _leave_out(self) -> None:
        logger.warning("a gradient is not finite; the importance of this step is left out")
        self._skipped += 1

    def _allocate(self, step: int, budget: int) -> None:
        scores = self._attached_to.averages.scores()
        values = self._attached_to.values()
        self._verdicts.ask((scores + values).isfinite().all(), partial(self._diverged, scores, values))
        parts = torch.split(scores, self._capacities)
        keeps = keep_top(parts, budget, self.minimum, self._costs, self.config.cost_exponent)
        self._attached_to.keep_only(keeps)
        for listener in self.on_allocate:
            listener(step, budget, dict(zip(self.modules, keeps, strict=True)))

    def _diverged(self, scores: Tensor, values: Tensor) -> None:
        parts = torch.split((scores + values).isfinite(), self._capacities)
        name = next(name for name, part in zip(self.modules, parts, strict=True) if not part.all())
        raise TrainingError(
            f"the triplets of {name!r} or their scores are not finite: the run has diverged. Lower the learning rate, "
            "or clip gradients."
        )

    def _freeze(self) -> None:
        self._verdicts.hear(wait=True)  # once in a run: a pattern from scores that are no numbers must not stay
        self._attached_to.freeze()
        if self._compact:
            self.compact()
