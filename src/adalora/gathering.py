"""A model that `fully_shard` has spread over processes, as a whole: put together for a file, or refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .errors import AdapterFileError, InjectionError
from .sharding import is_sharded, whole


def reshard_(model: nn.Module) -> None:
    """Let every module hold its part again, which is what trains: FSDP2 may leave it whole after a forward pass."""
    for module in model.modules():
        if _is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def refuse_sharded(model: nn.Module, what: str, remedy: str) -> None:
    """Raise InjectionError if `model` is sharded by FSDP, of either version: `what` cannot be done then."""
    for name, module in model.named_modules():
        flat = type(module).__name__ == "FullyShardedDataParallel"
        if flat or _is_fully_sharded(module) or any(is_sharded(p) for p in module._parameters.values()):
            raise InjectionError(f"{name or type(module).__name__!r} is sharded over processes, so {what}; {remedy}.")


def in_one_process(model: nn.Module, action: Callable[[], float]) -> float:
    """`action()`, run where every parameter of `model` that trained is whole, on the CPU; returns its result.

    For a sharded model every process must call this: the first runs `action`, all return its result, or raise.
    """
    reshard_(model)
    found = list(_trained_parts(model))
    if not found:
        return action()
    mesh = found[0][2].device_mesh  # type: ignore[attr-defined]
    first, result, failure = not any(mesh.get_coordinate()), float("nan"), None
    try:
        for module, name, parameter in found:
            value = whole(parameter)
            if first:
                module._parameters[name] = nn.Parameter(value.cpu(), requires_grad=parameter.requires_grad)
        if first:
            try:
                result = action()
            except Exception as error:  # the others wait to hear of it
                failure = error
    finally:
        for module, name, parameter in found:
            module._parameters[name] = parameter  # type: ignore[assignment]
    result, failed = _told(mesh, result, failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise AdapterFileError("the first process could not write the adapter; its own message says why.")
    return result


def _trained_parts(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Sharded parameters that belong to an adapter or train beside it, once for each place that has them."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter) and (parameter.requires_grad or "lora_" in name):
                yield module, name, parameter


def _told(mesh: Any, result: float, failed: bool) -> tuple[float, bool]:
    """What the first process of `mesh` says, in all of them."""
    told = torch.tensor([result, float(failed)], dtype=torch.float64, device=mesh.device_type)
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        distributed.broadcast(told, src=distributed.get_global_rank(group, 0), group=group)
    value, verdict = told.tolist()
    return value, bool(verdict)


def _is_fully_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
