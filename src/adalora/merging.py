"""Whether the increments act, and where: in the layers, in the weights themselves, or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .errors import InjectionError
from .gathering import refuse_sharded
from .injection import adapter_root, named_adapters


def merge(model: nn.Module) -> None:
    """Add every increment to its base weight. The originals are kept, so `unmerge` is exact.

    Raises InjectionError for a weight that another module shares: it would change there too; and where the
    adapter is disabled; and for a sharded model, whose weights no process holds whole.
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
    for _, module in named_adapters(root):
        module.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the base weights as they were, bit for bit."""
    for _, module in named_adapters(adapter_root(model)):
        module.unmerge()


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within the context the increments are in the weights, so that evaluation and generation cost what the base
    model costs; afterwards everything is as it was, bit for bit. Memory: one more matrix for each adapted one.

    Raises InjectionError as `merge` does.
    """
    before = [module for _, module in named_adapters(adapter_root(model)) if module.merged]
    merge(model)
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
