"""Adapters split over processes: parameters that are DTensors, as torch's `fully_shard` (FSDP2) makes them.

What is done entry by entry happens on the part that a process holds; what concerns a whole triplet is added up over
the processes. The rest of the library sees parts (`local`), where they lie (`place`) and sums (`add_up_`).

Whatever communicates here must be called by all processes of the mesh, in the same order.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .errors import TrainingError


class Place(NamedTuple):
    """The part of a tensor that is here: entries `start` to `stop` of dimension `dim`; `group` holds the others."""

    group: Any
    dim: int
    start: int
    stop: int


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is spread over a mesh of processes. Without torch.distributed.tensor in use none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the memory of `tensor`; a plain tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # so it is no operation on a DTensor, each of which takes longer than all else here
        return tensor.to_local()  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of it; of a sharded one a copy. Communicates."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def layout(tensor: Tensor) -> tuple[Any, ...] | None:
    """What two sharded tensors of one shape must share to be cut alike; None for a plain one."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None  # type: ignore[attr-defined]


def around(part: Tensor, parameter: Tensor) -> Tensor:
    """`part`, laid out as the local part of `parameter`, as a tensor of the shape of `parameter`; same memory."""
    if not is_sharded(parameter):
        return part
    return _sharded(part, parameter.device_mesh, parameter.placements, parameter.shape)  # type: ignore[attr-defined]


def place(tensor: Tensor) -> Place | None:
    """Which part of a tensor is here; None if all of it is. Raises TrainingError if it is cut in two dimensions."""
    if not is_sharded(tensor):
        return None
    # Asked for every parameter in every step, and kept on the mesh: groups come and go with it.
    mesh, key = tensor.device_mesh, (tensor.placements, tensor.shape)  # type: ignore[attr-defined]
    known: dict[Any, Place | None] = vars(mesh).setdefault("_adalora_places", {})
    if key not in known:
        known[key] = _place(mesh, *key)
    return known[key]


def _place(mesh: Any, placements: Any, shape: torch.Size) -> Place | None:
    cuts = [index for index, placement in enumerate(placements) if not placement.is_replicate()]
    if not cuts:
        return None
    if len(cuts) > 1 or type(placements[cuts[0]]).__name__ != "Shard":
        raise TrainingError(
            f"an adapter parameter is laid out as {placements}; adapters may be sharded along one dimension of the "
            "mesh (FSDP2, or FSDP2 with replicas). Leave tensor parallelism to the frozen weights."
        )
    dim, size = placements[cuts[0]].dim, shape[placements[cuts[0]].dim]
    step = -(-size // mesh.size(cuts[0]))
    start = min(step * mesh.get_local_rank(cuts[0]), size)
    return Place(mesh.get_group(cuts[0]), dim, start, min(start + step, size))


def add_up_(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the processes of `group`, in place; the same bits in all of them."""
    distributed.all_reduce(tensor, group=group)
    return tensor


def agreed(verdict: Tensor, group: Any) -> Tensor:
    """Whether the bool scalar `verdict` is true in all processes of `group`."""
    votes = verdict.to(torch.int32)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MIN, group=group)
    return votes.to(torch.bool)


def completed(parts: Sequence[Tensor], parameters: Sequence[Tensor], device: torch.device) -> Tensor:
    """For each of `parameters` (r, 1) the numbers of its rows here, `parts`; returns those of all rows, (sum of r,).

    One sum for each group of processes.
    """
    sums: dict[Any, list[tuple[int, Tensor]]] = defaultdict(list)
    complete = [part.view(-1).to(device) for part in parts]
    for index, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
        where = place(parameter)
        if where is not None:
            row = part.new_zeros(len(parameter))
            # Along its other dimension Λ has one entry, which lies with one process.
            row[where.start : where.stop if where.dim == 0 else None][: part.numel()] = part.view(-1)
            sums[where.group].append((index, row))
    for group, rows in sums.items():
        joined = add_up_(torch.cat([row for _, row in rows]), group)
        for (index, _), row in zip(rows, torch.split(joined, [len(row) for _, row in rows]), strict=True):
            complete[index] = row.to(device)
    return torch.cat(complete)


def turned(parameters: Sequence[Tensor], parts: Sequence[Tensor], dims: Sequence[int], back: bool) -> list[Tensor]:
    """`parts`, cut as the sharded `parameters` are, cut along `dims` instead; with `back` the other way round.

    One exchange for each shape that is not cut so already: every process sends each other one its piece, once.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        alike[parameter.shape, parameter.dtype, layout(parameter), dims[index]].append(index)
    turned = list(parts)
    for (shape, _, laid_out, dim), indices in alike.items():
        mesh, placements = laid_out
        stack = torch.stack([parts[index].contiguous() for index in indices])
        own, other = [_stacked(p) for p in placements], [_stacked(p, dim) for p in placements]
        if own == other:
            continue
        source, goal = (other, own) if back else (own, other)
        together = _sharded(stack, mesh, source, torch.Size((len(indices), *shape)))
        for index, part in zip(indices, together.redistribute(placements=goal).to_local().unbind(), strict=True):  # type: ignore[attr-defined]
            turned[index] = part
    return turned


def _stacked(placement: Any, dim: int | None = None) -> Any:
    """A placement for a stack of tensors: each is cut as before, or along `dim`."""
    return type(placement)(1 + (placement.dim if dim is None else dim)) if placement.is_shard() else placement


def _sharded(part: Tensor, mesh: Any, placements: Any, shape: torch.Size) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
    tensor: Tensor = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
    return tensor
