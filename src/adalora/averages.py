"""The two averages of importance, kept in the optimizer's state beside each parameter's own.

There they are saved, restored and moved with everything else that the optimizer holds. They are views of two flat
tensors for each device, so that a step costs a dozen operations, whatever the number of matrices. Of sharded
parameters a process averages the entries that it holds; only the scores are added up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .config import AdaLoraConfig
from .importance import entry_scores, magnitude_scores, triplet_scores, triplet_sums, update_averages_
from .layers import SVDAdapter
from .sharding import add_up_, agreed, around, completed, layout, local, place

SENSITIVITY, UNCERTAINTY = _KEYS = "adalora_sensitivity", "adalora_uncertainty"


class Averages:
    """Importance of the triplets of `modules`, from the gradients that `optimizer` steps with.

    Memory is taken when it is first needed, and anew where the parameters have moved since.
    """

    def __init__(self, optimizer: Optimizer, modules: Sequence[SVDAdapter], config: AdaLoraConfig) -> None:
        self._optimizer, self._modules, self._config = optimizer, modules, config
        self._shelves: list[_Shelf] = []

    def update(self) -> Tensor | None:
        """Take in the gradients of the step just done. Whether they were finite, if there were any: else nothing
        changed, on the device that had the fault.
        """
        if self._config.importance == "magnitude" or not self._modules:
            return None
        self._arrange()
        state, betas = self._optimizer.state, (self._config.beta1, self._config.beta2)
        verdicts = [shelf.update(state, *betas) for shelf in self._shelves if shelf.takes_part(state)]
        return torch.stack([verdict.to(self._device) for verdict in verdicts]).all() if verdicts else None

    def scores(self) -> Tensor:
        """S of every triplet, (sum of r,), in the order of the modules, of which there must be one."""
        if self._config.importance == "magnitude":
            parameters = [module.lora_E for module in self._modules]
            return completed([magnitude_scores(local(p).detach()) for p in parameters], parameters, self._device)
        self._arrange()
        state, kind = self._optimizer.state, self._config.importance
        parts = [part.to(self._device) for shelf in self._shelves for part in shelf.scores(state, kind)]
        return torch.cat(parts).index_select(0, self._order)

    def drop(self) -> None:
        """Free them: a final pattern asks no more questions."""
        for module in self._modules:
            for parameter in (module.lora_A, module.lora_E, module.lora_B):
                for key in _KEYS:
                    self._optimizer.state.get(parameter, {}).pop(key, None)
        self._shelves = []

    @property
    def _device(self) -> torch.device:
        return self._modules[0].lora_E.device

    def _arrange(self) -> None:
        if self._shelves and all(shelf.fits for shelf in self._shelves):
            return
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, module in enumerate(self._modules):
            A, B = module.lora_A, module.lora_B
            spread = tuple(map(layout, (A, module.lora_E, B)))
            alike[A.device, A.dtype, spread, A.shape, B.shape].append(index)
        shelves: dict[Any, list[list[int]]] = defaultdict(list)
        for (device, dtype, spread, *_), indices in alike.items():
            shelves[device, dtype, spread].append(indices)
        self._shelves = [_Shelf([[self._modules[i] for i in group] for group in groups]) for groups in shelves.values()]
        stacked = [i for groups in shelves.values() for group in groups for i in group]
        self._order = _positions(stacked, [module.capacity for module in self._modules]).to(self._device)


class _Shelf:
    """The averages of one device. Modules of one shape stand together: all their A, then all E, then all B.

    Sharded ones are all cut alike; what is here of them stands here.
    """

    def __init__(self, groups: list[list[SVDAdapter]]) -> None:
        kinds = ("lora_A", "lora_E", "lora_B")
        self._stacks = stacks = [[getattr(module, kind) for module in group] for group in groups for kind in kinds]
        self.parameters: list[Tensor] = [parameter for stack in stacks for parameter in stack]
        here = [local(parameter) for parameter in self.parameters]
        self._shapes = [(len(stack), *local(stack[0]).shape) for stack in stacks]
        where = place(self.parameters[0])
        self._group = None if where is None else where.group
        sizes = [part.numel() for part in here]
        self._flat = {key: torch.zeros(sum(sizes), dtype=here[0].dtype, device=here[0].device) for key in _KEYS}
        self._views = {
            key: [
                around(part.view_as(own), parameter)
                for part, own, parameter in zip(torch.split(flat, sizes), here, self.parameters, strict=True)
            ]
            for key, flat in self._flat.items()
        }

    @property
    def fits(self) -> bool:
        """Whether the parameters are where and what they were."""
        flat = self._flat[SENSITIVITY]
        return all(p.device == flat.device and p.dtype == flat.dtype for p in self.parameters)

    def takes_part(self, state: Any) -> bool:
        return any(p.grad is not None or SENSITIVITY in state.get(p, ()) for p in self.parameters)

    def update(self, state: Any, beta1: float, beta2: float) -> Tensor:
        self._adopt(state)
        weights = [local(parameter).detach() for parameter in self.parameters]
        pairs = zip(self.parameters, weights, strict=True)
        gradients = [torch.zeros_like(own) if p.grad is None else local(p.grad) for p, own in pairs]
        product = torch.cat([part.reshape(-1) for part in torch._foreach_mul(weights, gradients)])
        agree = None if self._group is None else partial(agreed, group=self._group)
        return update_averages_(self._flat[SENSITIVITY], self._flat[UNCERTAINTY], product, beta1, beta2, agree)

    def scores(self, state: Any, kind: Any) -> list[Tensor]:
        self._adopt(state)
        entries = entry_scores(self._flat[SENSITIVITY], self._flat[UNCERTAINTY], kind)
        sizes = [torch.Size(shape).numel() for shape in self._shapes]
        stacks = [part.view(shape) for part, shape in zip(torch.split(entries, sizes), self._shapes, strict=True)]
        if self._group is None:
            return [triplet_scores(*stacks[i : i + 3]).view(-1) for i in range(0, len(stacks), 3)]
        sums = [self._sums(i, stacks[i], stacks[i + 1], stacks[i + 2]) for i in range(0, len(stacks), 3)]
        return [add_up_(torch.cat([part.view(-1) for part in sums]), self._group)]

    def _sums(self, index: int, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        firsts = [stack[0] for stack in self._stacks[index : index + 3]]
        starts = []
        for first, triplets in zip(firsts, (0, 0, 1), strict=True):
            where = place(first)
            starts.append(where.start if where is not None and where.dim == triplets else 0)
        (r, in_), out = firsts[0].shape, firsts[2].shape[0]
        return triplet_sums((A, E, B), (starts[0], starts[1], starts[2]), (r, out, in_))

    def _adopt(self, state: Any) -> None:
        """See to it that the optimizer holds the views: it may have loaded averages, or forgotten them.

        A parameter that never had a gradient holds none: an optimizer that finds any state takes its own for
        initialized.
        """
        for key, views in self._views.items():
            for parameter, view in zip(self.parameters, views, strict=True):
                held = state[parameter].get(key) if parameter in state else None
                if held is view:
                    continue
                local(view).zero_() if held is None else local(view).copy_(local(held))
                if held is not None or parameter.grad is not None:
                    state[parameter][key] = view


def _positions(stacked: list[int], capacities: list[int]) -> Tensor:
    """Where each triplet, in the order of the modules, stands when they follow one another as `stacked` says."""
    starts = dict(zip(stacked, accumulate((capacities[i] for i in stacked), initial=0), strict=False))
    return torch.cat([torch.arange(starts[i], starts[i] + r) for i, r in enumerate(capacities)])
