"""The pattern of live triplets on the modules, and Λ zeroed where it says so; all modules of a device at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from .layers import SVDAdapter
from .sharding import local, place


def set_pattern_(modules: Iterable[SVDAdapter], keeps: list[Tensor]) -> None:
    """Make the bool tensors (r_k,) the pattern of the modules k, on whatever devices."""
    torch._foreach_copy_([module.lora_keep for module in modules], keeps)


def mask_(modules: Iterable[SVDAdapter]) -> None:
    """Set λ to 0 in every triplet that is not live, in the part of Λ that is here."""
    by_device: dict[torch.device, list[SVDAdapter]] = defaultdict(list)
    for module in modules:
        by_device[module.lora_E.device].append(module)
    for together in by_device.values():
        triplets = [local(module.lora_E).detach() for module in together]  # each (r, 1), or some of its rows
        keep = torch.cat([_kept_here(module) for module in together])
        masked = torch.where(keep.unsqueeze(1), torch.cat(triplets), 0.0)
        torch._foreach_copy_(triplets, torch.split(masked, [len(triplet) for triplet in triplets]))


def _kept_here(module: SVDAdapter) -> Tensor:
    where = place(module.lora_E)
    return module.lora_keep if where is None or where.dim else module.lora_keep[where.start : where.stop]
