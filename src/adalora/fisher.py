"""The Fisher score of Λ, in the optimizer's state beside each Λ's own: two numbers a triplet, nothing for P and Q.

By Euler's identity λ·∂L/∂λ is also what the row of Q and the column of P would say, summed over their entries. The
gradient of Λ is the task's alone: the regularizer has none there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .importance import update_fisher_
from .layers import SVDAdapter
from .sharding import agreed, around, completed, local, place

SQUARES, WEIGHT = _KEYS = "adalora_squares", "adalora_weight"


class FisherAverages:
    """Importance of the triplets of `modules`, over about `window` steps."""

    def __init__(self, optimizer: Optimizer, modules: Sequence[SVDAdapter], window: int) -> None:
        self._optimizer, self._modules, self._beta = optimizer, modules, 1 - 1 / window

    def update(self) -> Tensor | None:
        """Take in the gradients of the step just done. Whether they were finite, if there were any."""
        verdicts = []
        by_device: dict[tuple[torch.device, Any], list[SVDAdapter]] = defaultdict(list)
        for module in self._modules:
            if module.lora_E.grad is not None:
                where = place(module.lora_E)
                by_device[module.lora_E.device, where and where.group].append(module)
        for (_, group), together in by_device.items():
            values = torch.cat([local(module.lora_E).detach() for module in together])  # (sum of r, 1), or a part
            product = values * torch.cat([local(module.lora_E.grad) for module in together])  # type: ignore[arg-type]
            held = {key: [self._held(module, key) for module in together] for key in _KEYS}
            squares, weight = (torch.cat(held[key]) for key in _KEYS)
            agree = None if group is None else partial(agreed, group=group)
            verdicts.append(update_fisher_(squares, weight, product, self._beta, agree))
            sizes = [len(part) for part in held[SQUARES]]
            torch._foreach_copy_(held[SQUARES], torch.split(squares, sizes))
            torch._foreach_copy_(held[WEIGHT], torch.split(weight, sizes))
        return torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).all() if verdicts else None

    def scores(self) -> Tensor:
        """v / w of every triplet, (sum of r,), in the order of the modules; 0 where no gradient came yet."""
        device, parameters = self._modules[0].lora_E.device, [module.lora_E for module in self._modules]
        squares, weight = (torch.cat([self._known(p, key).to(device) for p in parameters]) for key in _KEYS)
        scores = squares / weight.clamp_min(torch.finfo(weight.dtype).tiny)  # 0 where no gradient came yet
        return completed(torch.split(scores, [len(local(p)) for p in parameters]), parameters, device)

    def drop(self) -> None:
        """Free them: a final pattern asks no more questions, and another basis has other answers."""
        for module in self._modules:
            for key in _KEYS:
                self._optimizer.state.get(module.lora_E, {}).pop(key, None)

    def _known(self, parameter: Tensor, key: str) -> Tensor:
        value = self._optimizer.state.get(parameter, {}).get(key)
        return torch.zeros_like(local(parameter)) if value is None else local(value)

    def _held(self, module: SVDAdapter, key: str) -> Tensor:
        state = self._optimizer.state[module.lora_E]
        if key not in state:
            state[key] = around(torch.zeros_like(local(module.lora_E).detach()), module.lora_E)
        value = state[key]
        assert isinstance(value, Tensor)
        return local(value)
