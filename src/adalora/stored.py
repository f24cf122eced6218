"""What of an adapted model goes into a file: the triplets that act, and the modules trained whole.

A triplet is stored if it is live or its Λ is not zero, so that a stored adapter always computes what the model
computed, also between two allocations, when pruned triplets grow again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .errors import AdaLoraWarning, AdapterFileError
from .injection import adapter_config, adapter_root, named_adapters, trained_biases, training_progress
from .layers import SVDAdapter
from .sharding import whole
from .targets import saved_modules


def acting(module: SVDAdapter) -> Tensor:
    """Bool tensor (r,): the triplets to store."""
    return module.lora_keep | (whole(module.lora_E).detach().view(-1) != 0)


def acting_factors(module: SVDAdapter) -> tuple[Tensor, Tensor, Tensor]:
    """A (k, in), E (k, 1), B (out, k) of the triplets to store, on the CPU."""
    keep = acting(module)
    factors = (module.lora_A[keep], module.lora_E[keep], module.lora_B[:, keep])
    return tuple(factor.detach().cpu().contiguous() for factor in factors)  # type: ignore[return-value]


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trained base biases and every tensor of `modules_to_save`, by their name in the base model, each once.

    They are copies: the file format refuses tensors that share memory, as tied ones do.
    """
    root, config, seen = adapter_root(model), adapter_config(model), set()
    for name, module in saved_modules(root, config):
        for key, value in module.state_dict().items():
            seen.add(f"{name}.{key}")
            yield f"{name}.{key}", _copy(value)
    for name, bias in trained_biases(root, config):
        if name not in seen:
            yield name, _copy(bias)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError if a tensor about to be stored holds NaN or infinity."""
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise AdapterFileError(
                f"nothing was written: {key!r} holds values that are not finite numbers, so training has diverged. "
                "Lower the learning rate, and go on from an earlier save."
            )


def warn_if_unfinished(model: nn.Module) -> None:
    """Say it loudly if the adapter about to be stored is not what its configuration promises."""
    root, config = adapter_root(model), adapter_config(model)
    modules = dict(named_adapters(root))
    stored, target = sum(int(acting(module).sum()) for module in modules.values()), config.target_r * len(modules)
    if training_progress(root).steps == 0:
        _warn(
            "the rank allocator has never run on this model, so its ranks are those of the start; attach one "
            "before training: adalora.RankAllocator(model, total_step=...).attach(optimizer)."
        )
    elif stored > target:
        _warn(
            f"the adapter holds {stored} triplets, its budget is {target}: the final phase was not reached. If "
            "training is over, call finalize() on the RankAllocator before saving."
        )
    known = {id(p) for m in modules.values() for p in m.parameters()}
    known |= {id(p) for _, m in saved_modules(root, config) for p in m.parameters()}
    known |= {id(p) for _, p in trained_biases(root, config)}
    lost = [name for name, p in root.named_parameters() if p.requires_grad and id(p) not in known]
    if lost:
        _warn(
            f"these parameters train but will not be stored: {', '.join(lost[:6])}{' …' if len(lost) > 6 else ''}; "
            "name their modules in modules_to_save."
        )


def probe(module: SVDAdapter) -> Tensor:
    """A fixed input (4, in) on which stored and live increments are compared."""
    generator = torch.Generator().manual_seed(module.shape[1])
    return torch.randn(4, module.shape[1], generator=generator, dtype=module.lora_A.dtype)


def increment(x: Tensor, factors: tuple[Tensor, Tensor, Tensor], scaling: float) -> Tensor:
    """s · x Aᵀ diag(E) Bᵀ for x (n, in), on the CPU; (n, out)."""
    A, E, B = factors
    return (x @ A.T) * (E.T * scaling) @ B.T


def _copy(value: Tensor) -> Tensor:
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _warn(message: str) -> None:
    warnings.warn(message, AdaLoraWarning, stacklevel=4)
