"""Freeing pruned triplets for good: parameters, gradients and optimizer state shrink together.

The model's function is the same before and after, up to the rounding of shorter sums: a triplet with λ = 0 adds
nothing. Pruned triplets can no longer come back, so the pattern must be final. What else changes in a run:

- The rest of the trajectory is that of the masked run wherever an update treats each entry by itself (SGD, the
  Adam family, RMSprop and the like): a live entry's gradient never depends on a dead triplet. Not so for optimizers
  that mix the entries of a matrix. Adafactor's averages and its clipping run over the whole matrix, its factors keep
  what dead triplets once put in, and it scales by the number of entries; Muon orthogonalizes and scales by the shape.
- The orthogonality regularizer loses the dead triplets: their rows q of A (and columns p of B) leave each norm
  ‖M Mᵀ - I‖ with their |q·q - 1|² and their products with live rows. Loss value and live gradients differ.
- Norm clipping no longer counts the gradients of pruned triplets. Those that the task gives to A and B are zero
  while λ = 0, but λ itself has one (the mask only undoes its update), and the regularizer gives A and B theirs.
- Weight decay of dead triplets ends; it never showed in the function.
- At rank 0 the parameters stay, empty and without gradient, and no optimizer steps them. Empty gradients, which no
  backward pass makes, break Adafactor and Muon.

Whatever holds the old parameters or their sizes is stale afterwards and cannot be found from here: lists kept for
clipping, moving averages of weights, wrappers, captured CUDA graphs, earlier state dicts, and the graph of a forward
pass that is still to run backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from .errors import TrainingError
from .layers import SVDAdapter
from .optimizers import unwrap

_TRIPLETS = {"lora_A": 0, "lora_E": 0, "lora_B": 1}  # the dimension that counts triplets
# The dimension over which torch's Adafactor has averaged. Shape alone does not tell where a matrix has a side of 1.
_AVERAGED = {"row_var": 1, "col_var": 0}


class _Fresh(NamedTuple):
    """What takes a parameter's place, and its optimizer state; None if it had none."""

    parameter: nn.Parameter
    state: dict[str, Any] | None


def compact_(modules: Mapping[str, SVDAdapter], optimizer: Optimizer) -> int:
    """Free every triplet whose `lora_keep` is False; returns how many.

    New parameters lora_A (k, in), lora_E (k, 1), lora_B (out, k) replace the old ones in each module that has such
    triplets, at the same place in `optimizer` and in its state; `lora_keep` becomes k times True. Modules without
    stay as they are. Call it between an optimizer step and the next forward pass.

    Raises TrainingError, with nothing changed, for: a pruned λ that is not zero, a parameter with hooks, one that is
    not plain (sharded, parametrized), one that trains but not in `optimizer`, one shared by modules with different
    masks, optimizer state that cannot be cut by triplet (LBFGS has none that can), more than one process.
    """
    names = {module: name for name, module in modules.items() if not module.lora_keep.all()}
    if not names:
        return 0
    optimizer = unwrap(optimizer)
    _check_run(optimizer)
    for module, name in names.items():
        _check_module(name, module, {id(p) for group in optimizer.param_groups for p in group["params"]})
    _check_shared(modules)
    fresh: dict[Tensor, _Fresh] = {}
    for module, name in names.items():
        kept = module.lora_keep.nonzero().view(-1)  # (k,)
        for key, dim in _TRIPLETS.items():
            old = getattr(module, key)
            state = optimizer.state.get(old)
            if state is not None:
                state = {entry: _cut_state(f"{name}.{key}", old, dim, kept, entry, state[entry]) for entry in state}
            fresh[old] = _Fresh(_cut_parameter(old, dim, kept), state)
    freed = sum(module.capacity - module.rank for module in names)
    _swap(names, optimizer, fresh)
    return freed


def _swap(modules: Iterable[SVDAdapter], optimizer: Optimizer, fresh: Mapping[Tensor, _Fresh]) -> None:
    for module in modules:
        for key in _TRIPLETS:
            module._parameters[key] = fresh[getattr(module, key)].parameter
        keep = torch.ones(module.capacity, dtype=torch.bool, device=module.lora_keep.device)
        module.register_buffer("lora_keep", keep, persistent=False)
    for group in optimizer.param_groups:
        # Into the same list: an optimizer may hold it under another name too.
        group["params"][:] = [fresh[p].parameter if p in fresh else p for p in group["params"]]
    for old, new in fresh.items():
        if new.state is not None:
            del optimizer.state[old]
            optimizer.state[new.parameter] = new.state


def _cut(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    return tensor.detach().index_select(dim, kept.to(tensor.device)).contiguous()


def _cut_parameter(old: nn.Parameter, dim: int, kept: Tensor) -> nn.Parameter:
    new = nn.Parameter(_cut(old, dim, kept), requires_grad=old.requires_grad)
    vars(new).update(vars(old))  # tags that others put there
    # An empty gradient says nothing, but divides by its number of entries in some optimizers.
    if old.grad is not None and kept.numel():
        new.grad = _cut(old.grad, dim, kept)
    return new


def _cut_state(where: str, parameter: nn.Parameter, dim: int, kept: Tensor, entry: str, value: Any) -> Any:
    """The part of one state entry that belongs to the kept triplets. Raises TrainingError if that is not known."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    found = f"is a {type(value).__name__}"
    if isinstance(value, Tensor):
        shape, averaged = list(parameter.shape), _AVERAGED.get(entry)
        if averaged is not None:
            shape[averaged] = 1
        if list(value.shape) == shape:
            return value if dim == averaged else _cut(value, dim, kept)
        if value.numel() == 1:  # a step counter, or another number for the whole parameter
            return value
        found = f"has shape {tuple(value.shape)}"
    raise TrainingError(
        f"the optimizer's {entry!r} for {where} {found}, the parameter has {tuple(parameter.shape)}: there is no "
        "telling which part belongs to which triplet. Keep the mask instead, or compact with a new optimizer."
    )


def _check_run(optimizer: Optimizer) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise TrainingError(
            f"compaction in a group of {distributed.get_world_size()} processes would go unnoticed by wrappers such as "
            "DDP, which hold the old parameters. Compact after training, when the process group is destroyed, or "
            "before it is made and the model wrapped (with find_unused_parameters=True: modules without triplets)."
        )
    if isinstance(optimizer, LBFGS):
        raise TrainingError(
            f"{type(optimizer).__name__} keeps its history in flat vectors over all parameters, which cannot be cut "
            "by triplet. Compact with another optimizer, or after training with a new one."
        )


def _check_module(name: str, module: SVDAdapter, held: set[int]) -> None:
    for key in _TRIPLETS:
        parameter, where = module._parameters.get(key), f"{name}.{key}"
        if type(parameter) is not nn.Parameter:
            kind = type(getattr(module, key, None)).__name__
            raise TrainingError(
                f"{where} is a {kind}, not a plain parameter of its module; compact before the model is sharded or "
                "parametrized."
            )
        if parameter.requires_grad and id(parameter) not in held:
            raise TrainingError(
                f"{where} trains, but not in this optimizer, so another one would keep the old parameter; pass the "
                "optimizer that was built from adalora.adapter_parameters(model)."
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise TrainingError(
                f"{where} has gradient hooks, which a new parameter would not have; remove them, compact, and register "
                "them again."
            )
    dead = module.lora_E.detach()[~module.lora_keep]  # (r - k, 1)
    if dead.any():
        raise TrainingError(
            f"{int(dead.count_nonzero())} pruned triplets of {name!r} still act, with λ up to "
            f"{float(dead.abs().max()):.3g}, and freeing them would change the model; zero lora_E where lora_keep is "
            "False first."
        )


def _check_shared(modules: Mapping[str, SVDAdapter]) -> None:
    first: dict[Tensor, tuple[str, str, SVDAdapter]] = {}
    for name, module in modules.items():
        for key in _TRIPLETS:
            owner, role, other = first.setdefault(getattr(module, key), (name, key, module))
            if key != role or not torch.equal(module.lora_keep, other.lora_keep):
                raise TrainingError(
                    f"{owner}.{role} and {name}.{key} are one parameter, but different triplets of it are pruned; give "
                    "both modules the same lora_keep."
                )
