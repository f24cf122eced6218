"""What must be known of optimizers to hook into any of them: wrappers, loss scaling, restored state."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import TrainingError
from .layers import SVDAdapter
from .sharding import agreed, layout, local, place

PreHook = Callable[[Optimizer, Any, dict[str, Any]], Any]
PostHook = Callable[[Optimizer, Any, dict[str, Any]], None]
_OPTIMIZER_FILE = Optimizer.profile_hook_step.__code__.co_filename

# State that torch's optimizers keep in the parameter's own shape. load_state_dict takes any shape.
_SAME_SHAPE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as accelerate's, which calls itself one but has no hooks."""
    while True:
        if type(optimizer).__module__.partition(".")[0] == "deepspeed":
            raise TrainingError(
                f"{type(optimizer).__name__} of DeepSpeed trains flat pieces of all parameters together, in which no "
                "triplet can be told from another, at every ZeRO stage; use DDP, or FSDP2 (see docs/scale.md)."
            )
        if not isinstance(getattr(optimizer, "optimizer", None), Optimizer):
            break
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TrainingError(
            f"attach needs a torch optimizer, got {type(optimizer).__name__}; pass the object whose step() trains."
        )
    return optimizer


def check_membership(optimizer: Optimizer, modules: Mapping[str, SVDAdapter]) -> None:
    """Raise TrainingError unless each adapter parameter trains, in 32 bits or more, in one place of `optimizer`."""
    places = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    for name, module in modules.items():
        check_dtype(name, module)
        for key in ("lora_A", "lora_E", "lora_B"):
            parameter = getattr(module, key)
            where = f"{name}.{key}"
            if parameter.dim() != 2:
                raise TrainingError(
                    f"{where} has shape {tuple(parameter.shape)}: something flattened it, as FSDP 1 does; "
                    "use torch.distributed.fsdp.fully_shard, which leaves parameters their shape."
                )
            check_place(where, parameter)
            if not parameter.requires_grad:
                raise TrainingError(
                    f"{where} is frozen; load the adapter with trainable=True, or set requires_grad on it."
                )
            if places[id(parameter)] != 1:
                found = "not in the optimizer" if not places[id(parameter)] else "in the optimizer twice"
                raise TrainingError(
                    f"{where} is {found}; build it from adalora.adapter_parameters(model) after adalora.inject."
                )


def check_place(where: str, parameter: Tensor) -> None:
    """Raise TrainingError for a parameter without values."""
    if parameter.is_meta:
        raise TrainingError(
            f"{where} is on the meta device and has no values to train: the model was never loaded, or accelerate "
            "offloads it, which puts new parameters in its place in each forward. Leave adapted modules where they are."
        )


def check_dtype(name: str, module: SVDAdapter) -> None:
    """Raise TrainingError for an adapter of less than 32 bits."""
    for key in ("lora_A", "lora_E", "lora_B"):
        dtype = getattr(module, key).dtype
        if dtype not in (torch.float32, torch.float64):
            raise TrainingError(
                f"{name}.{key} is {dtype}; importance is lost in 16 bits. Cast the model before adalora.inject, not "
                "after, and use autocast for speed."
            )


def check_restored_state(optimizer: Optimizer, modules: Mapping[str, SVDAdapter], own: tuple[str, ...]) -> None:
    """Raise TrainingError if state in `optimizer` has another shape than its adapter parameter."""
    for name, module in modules.items():
        for key in ("lora_A", "lora_E", "lora_B"):
            parameter = getattr(module, key)
            for entry, value in optimizer.state.get(parameter, {}).items():
                known = entry in _SAME_SHAPE or entry in own
                if known and isinstance(value, Tensor) and layout(value) != layout(parameter):
                    raise TrainingError(
                        f"the optimizer's {entry} for {name}.{key} is not spread over the processes as the parameter "
                        "is; load it with torch.distributed.checkpoint, or adalora.runfolder.load_run."
                    )
                if known and isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise TrainingError(
                        f"the optimizer's {entry} for {name}.{key} has shape {tuple(value.shape)}, the parameter "
                        f"{tuple(parameter.shape)}: this state belongs to an adapter of another size."
                    )


def step_is_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler found an overflow and lets a fused optimizer step without effect."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def is_rehearsal(optimizer: Optimizer) -> bool:
    """Whether the coming step is the one by which torch.distributed.checkpoint makes an optimizer fill its state:
    the first, with learning rates and gradients that are all zero. It is none of the run. Of a sharded model all agree.
    """
    if optimizer.state or any(bool(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return False
    zero = torch.stack([~local(gradient).any().cpu() for gradient in gradients]).all()
    for group in dict.fromkeys(where.group for where in map(place, gradients) if where is not None):
        zero = agreed(zero.to(gradients[0].device), group).cpu()
    return bool(zero)


def loss_scale(optimizer: Optimizer) -> Tensor | float:
    """The factor still on the gradients: a fused optimizer unscales inside its step, and then stores them so."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale


def when_gradients_are_there(args: Any, kwargs: dict[str, Any], then: Callable[[], None]) -> Any:
    """Call `then` before the update, from a step pre-hook with these arguments; returns what the hook must.

    A closure computes the gradients inside the step: `then` follows each of its calls.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        then()
        return None

    def closure_and_then() -> Any:
        loss = closure()
        then()
        return loss

    rest = {key: value for key, value in kwargs.items() if key != "closure"}
    return (args[0], closure_and_then, *args[2:]), rest


def once_a_step(before: PreHook, after: PostHook) -> tuple[PreHook, PostHook]:
    """The hooks, for the outermost call of `step` only.

    Where the step of a subclass calls that of its parent, torch runs all hooks at both, or not: at the parent's once
    any optimizer of that class was made. A step that failed has had its pre-hooks only.
    """
    is_open, inner = False, 0

    def outer_before(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal is_open, inner
        if is_open and _calls_under_way(optimizer) > 1:
            inner += 1
            return None
        is_open, inner = True, 0
        return before(optimizer, args, kwargs)

    def outer_after(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal is_open, inner
        if inner:
            inner -= 1
            return
        is_open = False
        after(optimizer, args, kwargs)

    return outer_before, outer_after


def _calls_under_way(optimizer: Optimizer) -> int:
    """How often torch's wrapper around `step`, which runs the hooks, is on the stack with this optimizer."""
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _OPTIMIZER_FILE:
            count += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count


def maximized(optimizer: Optimizer) -> set[int]:
    """Ids of the parameters along whose gradient `optimizer` ascends."""
    return {id(p) for group in optimizer.param_groups if group.get("maximize") for p in group["params"]}
