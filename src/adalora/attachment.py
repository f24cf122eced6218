"""An optimizer and the adapted modules that it trains: everything looked up once, so that a step looks up nothing."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .averages import SENSITIVITY, UNCERTAINTY, Averages
from .compaction import compact_
from .config import AdaLoraConfig
from .errors import TrainingError
from .fisher import SQUARES, WEIGHT, FisherAverages
from .gathering import reshard_
from .layers import SVDAdapter
from .masking import mask_, set_pattern_
from .optimizers import (
    check_dtype,
    check_membership,
    check_place,
    check_restored_state,
    is_rehearsal,
    loss_scale,
    maximized,
    step_is_skipped,
    when_gradients_are_there,
)
from .pending import require_start
from .refactoring import refactor_
from .regularizer import add_penalty_gradient_
from .runstate import RunState
from .sharding import completed, is_sharded, local, place


class Driver(Protocol):
    """An allocator, as its optimizer sees it."""

    root: nn.Module
    config: AdaLoraConfig
    modules: dict[str, SVDAdapter]

    @property
    def attached(self) -> bool:
        """Whether it still has hooks in the optimizer."""

    def detach(self) -> None:
        """Take them out."""


_drivers: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Driver]] = weakref.WeakKeyDictionary()


def claim(optimizer: Optimizer, driver: Driver) -> None:
    """Make `driver` the one that runs in `optimizer`; an earlier one of the same model is detached.

    Raises TrainingError if an allocator of another model runs there, or if `optimizer` cannot train the adapter.
    """
    reshard_(driver.root)
    check_membership(optimizer, driver.modules)
    _check_sharding(driver)
    earlier = _drivers.get(optimizer, lambda: None)()
    if earlier is not None and earlier.root is driver.root:
        earlier.detach()
    elif earlier is not None and earlier.attached:
        raise TrainingError(
            "this optimizer already runs the allocator of another model and both would count its steps; give each "
            "model its own optimizer."
        )
    _drivers[optimizer] = weakref.ref(driver)


def _check_sharding(driver: Driver) -> None:
    for name, module in driver.modules.items():
        factors = (module.lora_A, module.lora_E, module.lora_B)
        groups = {where.group if where else None for where in map(place, factors)}
        if len(groups) > 1:
            raise TrainingError(
                f"the factors of {name!r} are not spread over the same processes; let one fully_shard call hold all "
                "three, or ignore all three."
            )
        if driver.config.refactor and is_sharded(module.lora_E):
            raise TrainingError(
                f"refactor=True needs the whole factors of {name!r} in one process, but they are sharded; set "
                "refactor=False, or pass the adapter's parameters to fully_shard as ignored_params and train with DDP."
            )


class Attachment:
    """Made by `RankAllocator.attach`. `averages` and `run` are the importance and the state of the run so far.

    `root` was injected, `modules` are its adapters. `window`: steps that a Fisher score looks back.
    """

    averages: Averages | FisherAverages

    def __init__(self, optimizer: Optimizer, driver: Driver, window: int) -> None:
        self.optimizer, self._root, self._window = optimizer, driver.root, window
        self._modules: Mapping[str, SVDAdapter] = driver.modules
        self._config, self._rehearses = driver.config, False
        self.run = RunState(optimizer)
        self.restore()

    def restore(self) -> None:
        """Take up what the optimizer holds: when it is attached, and when it has loaded another state."""
        check_restored_state(self.optimizer, self._modules, (SENSITIVITY, UNCERTAINTY, SQUARES, WEIGHT))
        self.run.begin(self._modules)
        set_pattern_(self._modules.values(), self.run.patterns(self._modules))
        self._look()
        if self.run.frozen:
            self.freeze()

    def compact(self) -> None:
        """Free pruned triplets in modules and optimizer."""
        compact_(self._modules, self.optimizer)
        self._look()

    def freeze(self) -> None:
        """The pattern is final, so that the averages are of no more use. Sharded ones stay: such a run is loaded by a
        template that another run makes at its start, and what one of the two lacks would be an error or be lost.
        """
        self.run.freeze()
        if not any(is_sharded(module.lora_E) for module in self._modules.values()):
            self.averages.drop()

    def values(self) -> Tensor:
        """λ of every triplet, (sum of r,), on the device of the first."""
        parameters = [module.lora_E for module in self._modules.values()]
        return completed([local(p).detach() for p in parameters], parameters, parameters[0].device)

    def keep_only(self, keeps: list[Tensor]) -> None:
        """Prune all but `keeps`, bool (r_k,) of each module k, and re-factorize if the configuration says so."""
        set_pattern_(self._modules.values(), keeps)
        mask_(self._modules.values())
        self.run.keep(torch.cat(keeps))
        if self._config.refactor:
            refactor_([module for _, module, _ in self._trained], self.optimizer)
            self.averages.drop()  # what was known of importance belongs to the old triplets

    def before_step(self, args: Any, kwargs: Any) -> Any:
        """Check that the modules still are what was attached, and add the regularizer's gradient."""
        self._rehearses = is_rehearsal(self.optimizer)
        if self._rehearses:
            return None
        require_start(self._root)
        if self._compacted and not self.run.frozen:
            raise TrainingError(
                "the adapter was compacted, but the optimizer is at the start of a run; load the optimizer's state "
                "too, or read the saved adapter with load_adapter(..., trainable=True) and train that."
            )
        for name, module, factors in self._trained:
            own = module._parameters
            if "lora_E" not in own:
                raise TrainingError(f"{name!r} was ejected, but an allocator still drives it; call detach() on that.")
            if own["lora_A"] is not factors[0]:
                reshard_(self._root)  # FSDP2 may still show the gathered ones, of all modules
            if own["lora_A"] is not factors[0]:
                check_place(f"{name}.lora_A", module.lora_A)
                raise TrainingError(
                    f"{name!r} has other parameters than when the allocator was attached, and the optimizer trains the "
                    "old ones; build a new optimizer and attach to that."
                )
            if module.merged:
                raise TrainingError(f"{name!r} is merged and would not learn; call adalora.unmerge(model) first.")
            if any(factor.dtype.itemsize < 4 for factor in factors):
                check_dtype(name, module)
        return when_gradients_are_there(args, kwargs, self._add_penalty)

    def rehearsed(self) -> bool:
        """Whether the step just done was a rehearsal, see `is_rehearsal`; then the averages have taken their places."""
        if self._rehearses:
            self.averages.update()
        return self._rehearses

    def _look(self) -> None:
        # Modules without a triplet have nothing to train, to regularize or to score.
        modules = {name: module for name, module in self._modules.items() if module.capacity}
        self._trained = [(name, m, (m.lora_A, m.lora_E, m.lora_B)) for name, m in modules.items()]
        self._compacted = any(module.capacity < module.init_capacity for module in self._modules.values())
        trained = list(modules.values())
        if self._config.importance == "fisher":
            self.averages = FisherAverages(self.optimizer, trained, self._window)
        else:
            self.averages = Averages(self.optimizer, trained, self._config)

    def _add_penalty(self) -> None:
        weight, optimizer = self._config.orth_reg_weight, self.optimizer
        trained = any(factor.grad is not None for _, _, factors in self._trained for factor in factors)
        if weight and trained and not step_is_skipped(optimizer):
            modules, scaled = [module for _, module, _ in self._trained], weight * loss_scale(optimizer)
            add_penalty_gradient_(modules, self._config.orth_reg_form, scaled, maximized(optimizer))
