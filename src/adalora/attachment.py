"""An optimizer and the adapted modules that it trains: everything looked up once, so that a step looks up nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from .averages import SENSITIVITY, UNCERTAINTY, Averages
from .compaction import compact_
from .config import AdaLoraConfig
from .errors import TrainingError
from .layers import SVDAdapter
from .masking import set_pattern_
from .optimizers import (
    check_dtype,
    check_restored_state,
    loss_scale,
    maximized,
    step_is_skipped,
    when_gradients_are_there,
)
from .regularizer import add_penalty_gradient_
from .runstate import RunState


class Attachment:
    """Made by `RankAllocator.attach`. `averages` and `run` are the importance and the state of the run so far."""

    def __init__(self, optimizer: Optimizer, modules: Mapping[str, SVDAdapter], config: AdaLoraConfig) -> None:
        self.optimizer, self._modules, self._config = optimizer, modules, config
        self.run = RunState(optimizer)
        self.restore()

    def restore(self) -> None:
        """Take up what the optimizer holds: when it is attached, and when it has loaded another state."""
        check_restored_state(self.optimizer, self._modules, (SENSITIVITY, UNCERTAINTY))
        set_pattern_(self._modules.values(), self.run.patterns(self._modules))
        self._look()

    def compact(self) -> None:
        """Free pruned triplets in modules and optimizer."""
        compact_(self._modules, self.optimizer)
        self._look()

    def before_step(self, args: Any, kwargs: Any) -> Any:
        """Check that the modules still are what was attached, and add the regularizer's gradient."""
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
                raise TrainingError(
                    f"{name!r} has other parameters than when the allocator was attached, and the optimizer trains the "
                    "old ones; build a new optimizer and attach to that."
                )
            if module.merged:
                raise TrainingError(f"{name!r} is merged and would not learn; call adalora.unmerge(model) first.")
            if any(factor.dtype.itemsize < 4 for factor in factors):
                check_dtype(name, module)
        return when_gradients_are_there(args, kwargs, self._add_penalty)

    def _look(self) -> None:
        # Modules without a triplet have nothing to train, to regularize or to score.
        modules = {name: module for name, module in self._modules.items() if module.capacity}
        self._trained = [(name, m, (m.lora_A, m.lora_E, m.lora_B)) for name, m in modules.items()]
        self._compacted = any(module.capacity < module.init_capacity for module in self._modules.values())
        self.averages = Averages(self.optimizer, list(modules.values()), self._config)

    def _add_penalty(self) -> None:
        weight, optimizer = self._config.orth_reg_weight, self.optimizer
        trained = any(factor.grad is not None for _, _, factors in self._trained for factor in factors)
        if weight and trained and not step_is_skipped(optimizer):
            modules, scaled = [module for _, module, _ in self._trained], weight * loss_scale(optimizer)
            add_penalty_gradient_(modules, self._config.orth_reg_form, scaled, maximized(optimizer))
