"""RankAllocator: two optimizer hooks that run the method in any training loop.

Before each optimizer step the regularizer's gradient joins the others; after it, importance is updated from
the gradients that the step used and, when the schedule says so, the least important triplets are zeroed.
Everything that a resumed run needs lives in the optimizer: the averages in the state of each parameter, step
and mask in the first parameter group. So whoever checkpoints the optimizer checkpoints the method.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .allocation import keep_top
from .averages import SENSITIVITY, UNCERTAINTY, module_scores, update_averages
from .errors import ConfigError, TrainingError
from .injection import Progress, adapter_config, adapter_root, named_adapters, record_progress
from .optimizers import (
    check_dtype,
    check_membership,
    check_restored_state,
    loss_scale,
    maximized,
    step_is_skipped,
    unwrap,
    when_gradients_are_there,
)
from .regularizer import add_penalty_gradient_
from .schedule import Phase, Schedule
from .targets import bound

logger = logging.getLogger("adalora")

KEEP, STEP, FROZEN = "adalora_keep", "adalora_step", "adalora_frozen"

Listener = Callable[[int, int, Mapping[str, Tensor]], None]

_attached: weakref.WeakKeyDictionary[Optimizer, weakref.ref[RankAllocator]] = weakref.WeakKeyDictionary()


class RankAllocator:
    """Distributes the triplet budget of an adapted model while an optimizer trains it.

        RankAllocator(model, total_step=3000).attach(optimizer)

    total_step counts optimizer steps; it may come from the configuration instead. `on_allocate` listeners
    are called as f(step, budget, {module name: bool tensor (r,)}) after each allocation. Raises ConfigError
    if the length of the run is unknown or the schedule impossible, InjectionError without an adapter.
    """

    def __init__(self, model: nn.Module, total_step: int | None = None) -> None:
        self.root = adapter_root(model)
        self.config = config = adapter_config(model)
        if total_step is None or config.total_step not in (None, total_step):
            if total_step is not None:
                raise ConfigError(
                    f"the configuration says total_step={config.total_step}, but the loop runs {total_step} steps; "
                    "leave total_step out of one of them."
                )
            total_step = config.total_step
        if total_step is None:
            raise ConfigError(
                "how long will training be? Pass RankAllocator(model, total_step=...) in optimizer steps: "
                "batches per epoch × epochs / gradient accumulation."
            )
        self.modules = {name: module for name, module in named_adapters(self.root) if module.capacity}
        if not self.modules:
            raise ConfigError("every module has rank 0, so there is no budget to distribute; raise max_rank.")
        capacity = sum(module.capacity for module in self.modules.values())
        # A pruned adapter that trains on starts from the triplets that it still has.
        target = min(config.target_r * len(list(named_adapters(self.root))), capacity)
        self.schedule = Schedule.from_config(config, capacity, target, total_step)
        self.minimum = [min(bound(config.min_rank, name, 0), m.capacity) for name, m in self.modules.items()]
        self.on_allocate: list[Listener] = []
        self.skipped_steps = 0
        self._optimizer: Optimizer | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, optimizer: Any) -> RankAllocator:
        """Run the method in every step of `optimizer`, a torch optimizer or a wrapper of one; returns self.

        Attaching again replaces the earlier hooks. State that the optimizer already holds is taken up. Raises
        TrainingError if an adapter parameter is missing from the optimizer, in it twice, frozen or 16-bit.
        """
        optimizer = unwrap(optimizer)
        check_membership(optimizer, self.modules)
        earlier = _attached.get(optimizer, lambda: None)()
        if earlier is not None and earlier.root is self.root:
            earlier.detach()
        elif earlier is not None and earlier._hooks:
            raise TrainingError(
                "this optimizer already runs the allocator of another model and both would count its steps; give each "
                "model its own optimizer."
            )
        self.detach()
        self._optimizer = optimizer
        _attached[optimizer] = weakref.ref(self)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._restore),
        ]
        try:
            self._restore(optimizer)
        except TrainingError:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Stop running the method. Optimizer and adapter keep what they hold."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return int(self._group.get(STEP, 0))

    @property
    def frozen(self) -> bool:
        """Whether the pattern is final."""
        return bool(self._group.get(FROZEN, False))

    @property
    def phase(self) -> Phase:
        """The phase of the coming step."""
        return Phase.FINAL if self.frozen else self.schedule.phase(self.step)

    @property
    def budget(self) -> int:
        """Triplets that the schedule grants after the latest step."""
        target = self.schedule.target_budget
        return target if self.frozen else self.schedule.budget(max(self.step - 1, 0))

    @property
    def live(self) -> int:
        """Triplets that the latest allocation left alive."""
        return sum(module.rank for module in self.modules.values())

    def finalize(self) -> None:
        """Enforce the target budget now, for good; what a run that ends early must do. No-op if it is met.

        Raises TrainingError before the first step: nothing is known of importance then.
        """
        if self.frozen:
            assert self._optimizer is not None
            self._restore(self._optimizer)  # weights loaded since brought their own pattern
            self._mask()
            return
        if self.step == 0:
            raise TrainingError("no optimizer step has run, so there is no importance to allocate ranks by.")
        phase, step = self.phase, self.step
        self._allocate(step - 1, self.schedule.target_budget)
        self._group[FROZEN] = True
        logger.warning(
            "training stopped after step %d of %d, in the %s phase: the budget was enforced at once (%d of %d "
            "triplets kept), without final tuning of the kept ones",
            step,
            self.schedule.total_step,
            phase.value,
            self.live,
            self.schedule.initial_budget,
        )

    def restart(self) -> None:
        """Follow the whole schedule again, with every triplet alive; the averages forget by themselves."""
        for key in (KEEP, STEP, FROZEN):
            self._group.pop(key, None)
        assert self._optimizer is not None
        self._restore(self._optimizer)

    @property
    def _group(self) -> dict[str, Any]:
        if self._optimizer is None:
            raise TrainingError("the allocator has no optimizer yet; call attach(optimizer).")
        return self._optimizer.param_groups[0]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        for name, module in self.modules.items():
            if not hasattr(module, "lora_E"):
                raise TrainingError(f"{name!r} was ejected, but an allocator still drives it; call detach() on that.")
            if module.merged:
                raise TrainingError(f"{name!r} is merged and would not learn; call adalora.unmerge(model) first.")
            check_dtype(name, module)
        return when_gradients_are_there(args, kwargs, lambda: self._add_penalty(optimizer))

    def _add_penalty(self, optimizer: Optimizer) -> None:
        weight, modules = self.config.orth_reg_weight, list(self.modules.values())
        trained = any(p.grad is not None for m in modules for p in (m.lora_A, m.lora_E, m.lora_B))
        if weight and trained and not step_is_skipped(optimizer):
            scaled = weight * loss_scale(optimizer)
            add_penalty_gradient_(modules, self.config.orth_reg_form, scaled, maximized(optimizer))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if step_is_skipped(optimizer):
            self.skipped_steps += 1
            return
        step = self.step
        if not self.frozen:
            if step < self.schedule.total_step - self.schedule.tfinal:
                finite = update_averages(optimizer, self.modules.values(), self.config)
                self.skipped_steps += not finite
            # A resumed run may find that its new, shorter schedule has frozen already.
            if self.schedule.allocates(step) or step > self.schedule.freeze_step:
                self._allocate(step, self.schedule.budget(step))
            self._group[FROZEN] = step >= self.schedule.freeze_step
        else:
            self._mask()
        self._group[STEP] = step + 1
        record_progress(self.root, Progress(step + 1, self.schedule.total_step))

    def _allocate(self, step: int, budget: int) -> None:
        assert self._optimizer is not None
        scores = module_scores(self._optimizer, self.modules, self.config)
        keeps = keep_top(scores, budget, self.minimum)
        for module, keep in zip(self.modules.values(), keeps, strict=True):
            module.lora_keep.copy_(keep)
        # Not in the state of lora_E: an optimizer that finds any state there takes its own for initialized.
        self._group[KEEP] = torch.cat(keeps)
        self._mask()
        for listener in self.on_allocate:
            listener(step, budget, dict(zip(self.modules, keeps, strict=True)))

    def _mask(self) -> None:
        with torch.no_grad():
            for module in self.modules.values():
                module.lora_E.masked_fill_(~module.lora_keep.view(-1, 1), 0.0)

    def _restore(self, optimizer: Optimizer) -> None:
        """Take up what `optimizer` holds: after attach, and after its load_state_dict."""
        check_restored_state(optimizer, self.modules, (SENSITIVITY, UNCERTAINTY))
        capacities = [module.capacity for module in self.modules.values()]
        keep = self._group.get(KEEP, torch.ones(sum(capacities), dtype=torch.bool))
        if keep.numel() != sum(capacities):
            raise TrainingError(
                f"the optimizer's state masks {keep.numel()} triplets, the adapter has {sum(capacities)}: this state "
                "belongs to an adapter of another size."
            )
        for module, part in zip(self.modules.values(), keep.split(capacities), strict=True):
            module.lora_keep.copy_(part)
        record_progress(self.root, Progress(self.step, self.schedule.total_step))
