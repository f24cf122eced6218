"""Turning one module into its adapted subclass and back; `injection` does it to a whole model."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .config import Start
from .errors import InjectionError
from .layers import SVDAdapter, SVDConv1d, SVDConv2d, SVDConv3d, SVDEmbedding, SVDLinear
from .stepsize import INIT_STD

# Types of other packages stand by name, so that nothing is imported before such a module is met.
_REGISTRY: dict[str, type[SVDAdapter] | str] = {
    "torch.nn.modules.linear.Linear": SVDLinear,
    "torch.nn.modules.conv.Conv1d": SVDConv1d,
    "torch.nn.modules.conv.Conv2d": SVDConv2d,
    "torch.nn.modules.conv.Conv3d": SVDConv3d,
    "torch.nn.modules.sparse.Embedding": SVDEmbedding,
    "transformers.pytorch_utils.Conv1D": "adalora.integrations.conv1d:SVDConv1D",
}


_made: dict[type[nn.Module], type[SVDAdapter]] = {}


def adapter_type(module_type: type[nn.Module]) -> type[SVDAdapter] | None:
    """The adapter for a layer type or its nearest ancestor that has one; None if there is none."""
    for ancestor in module_type.__mro__:
        entry = _REGISTRY.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if isinstance(entry, str):
            module, _, name = entry.partition(":")
            entry = getattr(importlib.import_module(module), name)
        if entry is not None:
            return entry
    return None


def adapter_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) that the increment of an adaptable module has."""
    adapter = adapter_type(type(module))
    assert adapter is not None
    return adapter.shape_of(module)


def convert(module: nn.Module, r: int, scaling: float, dropout: float, start: Start = "gaussian") -> SVDAdapter:
    """Give `module`, in place, an increment of capacity r that is zero at first.

    "lora": B = 0, E = 1, A as LoRA's, so that training begins as LoRA's. With all others E = 0, A and B random.
    "gaussian": N(0, 0.02²). The rest: orthonormal rows of A and columns of B, as far as there are dimensions; what is
    to come from data takes their place later (`start`).

    The adapter is fp32 (fp64 on an fp64 base) on the device of the weight: importance is a product of small
    numbers, which 16 bits lose. Raises InjectionError if there is no adapter for the type.
    """
    adapter = adapter_type(type(module))
    if adapter is None:
        raise InjectionError(f"there is no SVD adapter for {type(module).__name__} modules.")
    weight: Tensor = module.weight  # type: ignore[assignment]
    module.__class__ = _subclass(adapter, type(module))
    assert isinstance(module, SVDAdapter)
    (out, in_), dtype = module.shape, torch.promote_types(weight.dtype, torch.float32)
    module.scaling, module.lora_dropout, module.adapter_enabled = scaling, dropout, True
    module.init_capacity = r
    module.register_buffer("base_weight", None, persistent=False)
    module.register_buffer("lora_keep", torch.ones(r, dtype=torch.bool, device=weight.device), persistent=False)
    for name, size in (("lora_A", (r, in_)), ("lora_E", (r, 1)), ("lora_B", (out, r))):
        module.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=dtype, device=weight.device)))
    nn.init.constant_(module.lora_E, start_value(start))
    if start == "lora":
        nn.init.uniform_(module.lora_A, -(in_**-0.5), in_**-0.5)
    else:
        for factor in (module.lora_A, module.lora_B):
            nn.init.orthogonal_(factor) if start != "gaussian" and r else nn.init.normal_(factor, std=INIT_STD)
    if isinstance(module, SVDEmbedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.lora_A[:, module.padding_idx] = 0  # the padding row stays what it is
    return module


def start_value(start: Start) -> float:
    """λ of all triplets before training."""
    return 1.0 if start == "lora" else 0.0


def resize(module: SVDAdapter, r: int) -> None:
    """Give `module` new factors of capacity r, all zero, and every triplet live: what is about to be loaded fits."""
    for key, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        old = getattr(module, key)
        shape = [r if index == dim else size for index, size in enumerate(old.shape)]
        module.register_parameter(key, nn.Parameter(old.detach().new_zeros(shape), requires_grad=old.requires_grad))
    keep = torch.ones(r, dtype=torch.bool, device=module.lora_keep.device)
    module.register_buffer("lora_keep", keep, persistent=False)


def restore(module: SVDAdapter) -> None:
    """Take the increment away, in place: the base layer as it was, bit for bit."""
    module.unmerge()
    for name in ("lora_A", "lora_E", "lora_B"):
        del module._parameters[name]
    for name in ("lora_keep", "base_weight"):
        del module._buffers[name]
        module._non_persistent_buffers_set.discard(name)
    for name in ("scaling", "lora_dropout", "adapter_enabled", "init_capacity"):
        delattr(module, name)
    base = type(module).base_type
    module.__class__ = base  # type: ignore[assignment]


def _subclass(adapter: type[SVDAdapter], base: type[nn.Module]) -> type[SVDAdapter]:
    """`adapter` itself, or for a subclass of the layer it was made for, a class that inherits both."""
    if adapter.base_type is base:
        return adapter
    if base not in _made:
        body = {"base_type": base, "__reduce_ex__": _reduce, "__module__": __name__}
        _made[base] = type(f"SVD{base.__name__}", (adapter, base), body)
    return _made[base]


def _reduce(module: SVDAdapter, protocol: Any) -> tuple[Any, ...]:
    # Classes made at run time have no importable name; pickle and deepcopy make them again from the base.
    return _rebuild, (type(module).base_type,), module.__dict__


def _rebuild(base: type[nn.Module]) -> SVDAdapter:
    adapter = adapter_type(base)
    assert adapter is not None
    cls = _subclass(adapter, base)
    return cls.__new__(cls)
