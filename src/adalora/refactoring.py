"""Re-factorisation of modules in place, with what their optimizer holds; the algebra is in `basis`."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .basis import Turn, moved_first, square_factors, turn
from .errors import TrainingError
from .layers import SVDAdapter, SVDEmbedding
from .optimizers import unwrap

logger = logging.getLogger("adalora")

_KINDS = ("lora_A", "lora_E", "lora_B")
_FIRST = frozenset({"exp_avg", "momentum_buffer"})  # averages of gradients
_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})  # of their squares
_COARSE = frozenset({"row_var", "col_var"})  # of squares over rows or columns, in torch's Adafactor
# exp_avg² / exp_avg_sq of Adam, with its betas of .9 and .999, is at most this, whatever the gradients were.
_LONGEST = 52.9


def refactor_(modules: Sequence[SVDAdapter], optimizer: Any) -> None:
    """Write the increments of `modules` as their singular value decompositions, in place; ΔW stays.

    Call it between an optimizer step and the next forward pass; gradients that are still there keep the old basis.
    Computed in fp64. In the state of `optimizer` (a torch optimizer, a wrapper of one, or None) averages of gradients
    move with the basis, but not so far that a step would become longer than any of Adam's; those of squares follow the
    lengths of p and q only. Averages over rows or columns stay. A parameter with other tensors,
    whose meaning is unknown, loses all of its state, with a warning. Averages of importance belong to the old basis
    and are the caller's to restart. Raises TrainingError, with nothing changed, for LBFGS and for a parameter that
    modules share; and where factors are not finite.
    """
    optimizer = None if optimizer is None else unwrap(optimizer)
    modules = [module for module in modules if module.capacity]
    _check(modules, optimizer)
    if optimizer is not None:
        _drop_unknown_state(modules, optimizer)
    alike: dict[Any, list[SVDAdapter]] = defaultdict(list)
    for module in modules:
        padding = module.padding_idx if isinstance(module, SVDEmbedding) else None
        A, B = module.lora_A, module.lora_B
        alike[A.device, A.dtype, A.shape, B.shape, padding].append(module)
    for (*_, padding), group in alike.items():
        with torch.no_grad():
            turned = _turn(group, padding)
            if optimizer is not None:
                _move_state(group, optimizer, turned)
            for key, new in zip(_KINDS, (turned.new_Q.mT, turned.new_E.unsqueeze(2), turned.new_P), strict=True):
                torch._foreach_copy_([getattr(module, key) for module in group], list(new.unbind()))


def _turn(group: Sequence[SVDAdapter], padding: int | None) -> Turn:
    A, E, B = (torch.stack([getattr(module, key) for module in group]).double() for key in _KINDS)
    # Between two allocations a pruned triplet may have grown back, and then it acts.
    live = torch.stack([module.lora_keep for module in group]) | (E.squeeze(2) != 0)
    turned = turn(A, E, B, live)
    if padding is not None:  # a padding row that is zero stays exactly zero
        turned.new_Q[:, padding] *= (A[..., padding] != 0).any(1, keepdim=True)
    return turned


def _move_state(group: Sequence[SVDAdapter], optimizer: Optimizer, turned: Turn) -> None:
    parameters = {key: [getattr(module, key) for module in group] for key in _KINDS}
    states = {key: [optimizer.state.get(p, {}) for p in same] for key, same in parameters.items()}
    entries = {entry for same in states.values() for state in same for entry in state}
    for key, factors in zip(_KINDS, square_factors(turned), strict=True):
        for entry in _SQUARES & entries:
            for state, factor in zip(states[key], factors.unbind(), strict=True):
                if entry in state:
                    state[entry].mul_(factor)
    for entry in _FIRST & entries:
        old = [
            torch.stack([_held(state, entry, p) for state, p in zip(states[key], parameters[key], strict=True)])
            for key in _KINDS
        ]
        for key, new in zip(_KINDS, moved_first((old[0], old[1], old[2]), turned), strict=True):
            for state, value in zip(states[key], new.unbind(), strict=True):
                if state.get(entry) is None:
                    continue
                if entry == "exp_avg" and "exp_avg_sq" in state:
                    # Not by raising the squares: they would remember it for a thousand steps, momentum for ten.
                    most = (_LONGEST * state["exp_avg_sq"].double()).sqrt()
                    value = value.clamp(-most, most)
                state[entry].copy_(value)


def _held(state: Mapping[str, Any], entry: str, parameter: Tensor) -> Tensor:
    value = state.get(entry)
    return (torch.zeros_like(parameter) if value is None else value).double()


def _check(modules: Sequence[SVDAdapter], optimizer: Optimizer | None) -> None:
    if isinstance(optimizer, LBFGS):
        raise TrainingError(
            f"{type(optimizer).__name__} keeps its history in flat vectors over all parameters, which cannot be moved "
            "to another basis; use another optimizer, or no re-factorisation."
        )
    counts = Counter(id(getattr(module, key)) for module in modules for key in _KINDS)
    if any(number > 1 for number in counts.values()):
        raise TrainingError("two modules share an adapter parameter, but each needs a basis of its own; untie them.")


def _drop_unknown_state(modules: Sequence[SVDAdapter], optimizer: Optimizer) -> None:
    """An optimizer that finds no state begins anew; half a state it could not read."""
    found: set[str] = set()
    for parameter in (getattr(module, key) for module in modules for key in _KINDS):
        state = optimizer.state.get(parameter, {})
        unknown = {entry for entry, value in state.items() if not _is_known(entry, value, parameter)}
        if unknown:
            found |= unknown
            del optimizer.state[parameter]
    if found:
        logger.warning(
            "%s keeps %s for adapter parameters, which cannot be moved to the new basis: their state starts anew",
            type(optimizer).__name__,
            sorted(found),
        )


def _is_known(entry: str, value: Any, parameter: Tensor) -> bool:
    if entry.startswith("adalora_"):  # averages of importance
        return True
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str)
    if entry in _FIRST or entry in _SQUARES:
        return value.shape == parameter.shape
    return entry in _COARSE or value.numel() == 1  # a step counter, or another number for the whole parameter
