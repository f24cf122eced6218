"""Whether the increments act, and where: in the layers, in the weights themselves, or not at all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import InjectionError
from .gathering import refuse_sharded
from .injection import adapter_root, named_adapters
from .layers import SVDAdapter
from .quantized import Into, input_type, is_quantized

logger = logging.getLogger("adalora")


class MergeError(NamedTuple):
    """How far outputs of merged layers are from those of unmerged ones, on fixed normal inputs; the worst layer each.

    `largest`: absolute; `relative`: of the norm of the layer's output; `of_increment`: of the norm of what the adapter
    adds to it, which at 1 is as good as lost.
    """

    largest: float
    relative: float
    of_increment: float
    layer: str  # where `relative` is

    def __str__(self) -> str:
        return (
            f"merged outputs differ by at most {self.largest:.2g}; by {100 * self.relative:.2g}% of the output (in "
            f"{self.layer}) and {100 * self.of_increment:.2g}% of what the adapter adds"
        )


def merge(model: nn.Module, *, quantized: Into | None = None) -> MergeError | None:
    """Add every increment to its base weight. The originals are kept, so `unmerge` is exact.

    A quantized weight cannot take an increment without rounding: `quantized` says what becomes of it, "dequantize" or
    "requantize" (of the base's own kind). The error of that is measured, logged and returned; None where no layer is
    quantized.

    Raises InjectionError for a weight that another module shares: it would change there too; where the adapter is
    disabled; for a quantized weight without that choice; and for a sharded model, whose weights no process holds whole.
    """
    root = adapter_root(model)
    refuse_sharded(root, "its weights cannot take the increments", "train and evaluate it unmerged")
    if not all(module.adapter_enabled for _, module in named_adapters(root)):
        raise InjectionError("the adapter is disabled, and merging would enable it; leave adalora.disabled first.")
    uses = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
    places = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
    for name, module in named_adapters(root):
        if uses[id(module.weight)] > places[id(module)]:
            raise InjectionError(
                f"cannot merge {name!r}: its weight is tied to another module, which would change too. Untie "
                "them, or exclude the module from target_modules."
            )
    new = [(name, module) for name, module in named_adapters(root) if not module.merged]
    try:
        errors = [_merge(name, module, quantized, float_type(root)) for name, module in new]
    except InjectionError:
        for _, module in new:
            module.unmerge()
        raise
    found = [error for error in errors if error is not None]
    if not found:
        return None
    error = MergeError(
        max(e.largest for e in found),
        max(e.relative for e in found),
        max(e.of_increment for e in found),
        max(found, key=lambda e: e.relative).layer,
    )
    logger.warning("%d quantized layers merged (%s): %s", len(found), quantized, error)
    return error


def float_type(model: nn.Module) -> torch.dtype:
    """The floating point type of a base model: that of its first parameter that has one."""
    types = (p.dtype for name, p in model.named_parameters() if ".lora_" not in name and p.is_floating_point())
    return next(types, torch.float32)


def _merge(name: str, module: SVDAdapter, into: Into | None, dtype: torch.dtype) -> MergeError | None:
    """Merge one layer; what it cost, if its weight is quantized."""
    if not is_quantized(module):
        module.merge()
        return None
    x = torch.randn(4, module.shape[1], generator=torch.Generator().manual_seed(module.shape[1]))
    x = x.to(module.weight.device, input_type(module, dtype))
    with torch.no_grad():
        before, added = _output(module, x), (x.float() @ module.delta_weight().float().T).norm()
        module.merge(into, dtype)
        gap = _output(module, x) - before
    relative, of_increment = gap.norm() / before.norm(), gap.norm() / added if added else added
    return MergeError(float(gap.abs().max()), float(relative), float(of_increment), name)


def _output(module: SVDAdapter, x: Tensor) -> Tensor:
    training = module.training
    module.train(False)
    try:
        return type(module).forward(module, x).float()
    finally:
        module.train(training)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the base weights as they were, bit for bit."""
    for _, module in named_adapters(adapter_root(model)):
        module.unmerge()


@contextmanager
def merged(model: nn.Module, *, quantized: Into | None = None) -> Iterator[None]:
    """Within the context the increments are in the weights, so that evaluation and generation cost what the base
    model costs; afterwards everything is as it was, bit for bit. Memory: one more matrix for each adapted one.

    Raises InjectionError as `merge` does, and takes the same `quantized`.
    """
    before = [module for _, module in named_adapters(adapter_root(model)) if module.merged]
    merge(model, quantized=quantized)
    try:
        yield
    finally:
        for _, module in named_adapters(adapter_root(model)):
            if module not in before:
                module.unmerge()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context no increment acts; may be nested.

    That is the base model, unless biases or `modules_to_save` trained: those keep what they learned.
    """
    modules = [module for _, module in named_adapters(adapter_root(model))]
    if any(module.merged for module in modules):
        raise InjectionError("the adapter is merged into the weights; call adalora.unmerge(model) first.")
    before = [module.adapter_enabled for module in modules]
    for module in modules:
        module.adapter_enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.adapter_enabled = enabled
