"""Putting adapters into a model and taking them out, and what is asked of a whole adapted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .budget import Budget, check_bounds, plan_budget
from .config import AdaLoraConfig
from .conversion import adapter_shape, convert, resize, restore, start_value
from .errors import InjectionError, TrainingError
from .gathering import refuse_sharded
from .layers import SVDAdapter
from .pending import expect_start, start_made
from .quantized import weight_size
from .quantizedmodels import prepare, refuse_trained, release
from .sharding import completed, local
from .stepsize import usual_alpha
from .targets import bound, find_targets, matches, saved_modules

M = TypeVar("M", bound=nn.Module)

_CONFIG = "adalora_config"  # where an adapted model remembers its configuration
_PROGRESS = "adalora_progress"  # and how far training got


class Progress(NamedTuple):
    """Optimizer steps that an allocator has seen, of how many; 0 if none ever ran, None for one from a file."""

    steps: int | None = None
    total_step: int | None = None


def inject(model: M, config: AdaLoraConfig | None = None) -> M:
    """Adapt `model` in place and freeze the rest of it; returns the same model, whose function is unchanged.

    Trainable afterwards: the adapters, `modules_to_save`, and the biases that `bias` asks for. Raises
    InjectionError, leaving the model as it was, if nothing matches or a match cannot be adapted.
    """
    _inject(uncompiled(model), config or AdaLoraConfig())
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, by whose names files go; any other model is returned as it is."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def _inject(model: nn.Module, config: AdaLoraConfig) -> None:
    if hasattr(model, "peft_config"):
        raise InjectionError(
            f"{type(model).__name__} already carries PEFT adapters; take them out with model.unload() and "
            "inject into the base model."
        )
    targets = find_targets(model, config)
    for pattern in config.modules_to_save or ():
        if not any(matches(name, [pattern]) for name, _ in model.named_modules()):
            raise InjectionError(f"modules_to_save names {pattern!r}, but {type(model).__name__} has no such module.")
    for name, module in model.named_modules():
        if _CONFIG in vars(module):
            raise InjectionError(
                f"{name or 'the model'!r} has adapters already; call adalora.eject on it and inject once."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InjectionError(f"{name!r} is lazy and cannot be frozen yet; run one forward pass first.")
    ranks = {name: bound(config.max_rank, name, config.init_r) for name in targets}
    shapes = {name: adapter_shape(module) for name, module in targets.items()}
    budget = plan_budget(config, shapes, ranks, base_size(model))
    check_bounds(config, ranks, budget)
    if config.lora_alpha is None:
        config = dataclasses.replace(config, lora_alpha=usual_alpha(config, shapes, budget.rank))
    install(model, config, ranks)
    record_progress(model, Progress(0, config.total_step))
    expect_start(model, config.init_lora_weights)


def install(model: M, config: AdaLoraConfig, ranks: dict[str, int]) -> M:
    """Convert the modules that `ranks` names, each with its capacity, and choose what trains."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise InjectionError(
            f"{type(model).__name__} has copied or registered the parameters already, and new ones would not be kept "
            "equal between processes; inject into model.module before wrapping it."
        )
    refuse_sharded(model, "new parameters would not be", "inject, or load the adapter, before fully_shard")
    for name, module in saved_modules(model, config):
        refuse_trained(name, module)
    prepare(model)
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        convert(modules[name], rank, config.scaling, config.lora_dropout, config.init_lora_weights)
    trained: list[tuple[str, Any]] = [*saved_modules(model, config), *trained_biases(model, config)]
    for _, part in trained:
        part.requires_grad_(True)
    setattr(model, _CONFIG, config)
    record_progress(model, Progress(None, config.total_step))
    model.register_load_state_dict_pre_hook(_follow_loaded_capacity)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(_follow_loaded_ranks)  # type: ignore[no-untyped-call]
    return model


def eject(model: M) -> M:
    """Remove every adapter from `model` in place: its layers and their weights as they were, bit for bit.

    Biases and `modules_to_save` that trained keep what they learned. Nothing is trainable afterwards.
    """
    root = adapter_root(model)
    refuse_sharded(root, "FSDP drives its layers", "save the adapter and load a fresh base model")
    root.requires_grad_(False)
    for hooks, ours in (
        (root._load_state_dict_pre_hooks, _follow_loaded_capacity),
        (root._load_state_dict_post_hooks, _follow_loaded_ranks),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is ours]:
            del hooks[key]
    for _, module in named_adapters(root):
        restore(module)
    release(root)
    delattr(root, _CONFIG)
    delattr(root, _PROGRESS)
    start_made(root)
    return model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should get: everything trainable, each parameter once."""
    adapter_root(model)  # raises where there is no adapter
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def named_adapters(model: nn.Module) -> Iterator[tuple[str, SVDAdapter]]:
    """Adapted modules with their names, each once, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, SVDAdapter):
            yield name, module


def trained_biases(model: nn.Module, config: AdaLoraConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """Base biases that train, by full name. A bias is a parameter whose own name is `bias`."""
    for name, module in model.named_modules():
        bias = module._parameters.get("bias")
        chosen = config.bias == "all" or (config.bias == "lora_only" and isinstance(module, SVDAdapter))
        if bias is not None and chosen:
            yield f"{name}.bias".lstrip("."), bias


def _follow_loaded_capacity(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before load_state_dict: take on the size of a compacted adapter, or give it up for a whole one.

    A compacted state says by what it is scaled. Any other size is left for torch to refuse: it belongs to a
    configuration with another rank and scaling.
    """
    for name, module in named_adapters(model):
        scaling = state.pop(f"{prefix}{name}.lora_scaling", None)
        A, E, B = (state.get(f"{prefix}{name}.{key}") for key in ("lora_A", "lora_E", "lora_B"))
        if A is None or E is None or B is None or len(E) == module.capacity:
            continue
        r, (out, in_) = len(E), module.shape
        fits = (A.shape, E.shape, B.shape) == ((r, in_), (r, 1), (out, r))
        if fits and (r == module.init_capacity or (scaling is not None and float(scaling) == module.scaling)):
            if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
                raise TrainingError(
                    f"the state has {r} triplets for {name!r}, the model {module.capacity}; new parameters are needed, "
                    "which DistributedDataParallel would not keep equal. Load before any process group is made."
                )
            resize(module, r)


def _follow_loaded_ranks(model: nn.Module, keys: Any) -> None:
    """After load_state_dict: a triplet is live if its Λ is not zero, unless nothing was trained yet.

    An optimizer that is restored as well knows the mask itself, and then says so.
    """
    modules = dict(named_adapters(model))
    if any(f"{name}.lora_E" in keys.missing_keys for name in modules):
        return
    start_made(model)
    lambdas = [module.lora_E for module in modules.values()]
    values = completed([local(parameter).detach() for parameter in lambdas], lambdas, torch.device("cpu"))
    trained = bool((values != start_value(adapter_config(model).init_lora_weights)).any())
    for module, part in zip(modules.values(), torch.split(values, list(map(len, lambdas))), strict=True):
        live = part != 0
        module.lora_keep.copy_(live if trained else torch.ones_like(live))
    if trained and training_progress(model).steps == 0:
        record_progress(model, Progress(None, training_progress(model).total_step))


def adapter_root(model: nn.Module) -> nn.Module:
    """The module that was injected: `model`, or what a wrapper such as DDP holds. Raises InjectionError."""
    if not isinstance(model, nn.Module):
        raise InjectionError(
            f"{type(model).__name__} is no module. If it is a stage of a pipeline over processes: none of these sees "
            "the scores of all stages, so the budget could not move between them; use device_map, DDP or FSDP2."
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InjectionError(
            "FullyShardedDataParallel, FSDP's first version, keeps parameters in flat pieces without rows or columns; "
            "use torch.distributed.fsdp.fully_shard (accelerate: fsdp_version=2)."
        )
    roots = [module for module in model.modules() if _CONFIG in vars(module)]
    if not roots:
        raise InjectionError(
            f"{type(model).__name__} has no adapter; call adalora.inject(model, config) or adalora.load_adapter first."
        )
    if len(roots) > 1:
        raise InjectionError(
            f"{type(model).__name__} holds {len(roots)} adapted models and only one can be meant; pass one of them, "
            "or inject once into the whole."
        )
    return roots[0]


def adapter_config(model: nn.Module) -> AdaLoraConfig:
    """The configuration that `model` was injected with."""
    config = getattr(adapter_root(model), _CONFIG)
    assert isinstance(config, AdaLoraConfig)
    return config


def model_budget(model: nn.Module) -> Budget:
    """What there is to share out in an adapted model; the target may lie above what a pruned adapter still has."""
    root, adapters = adapter_root(model), dict(named_adapters(adapter_root(model)))
    shapes = {name: module.shape for name, module in adapters.items()}
    capacities = {name: module.init_capacity for name, module in adapters.items()}
    return plan_budget(adapter_config(root), shapes, capacities, base_size(root))


def base_size(model: nn.Module) -> int:
    """Parameters of `model` without those of adapters; a quantized weight counts as what it stands for."""
    factors = {id(p) for _, m in named_adapters(model) for p in (m.lora_A, m.lora_E, m.lora_B)}
    return sum(weight_size(p) for p in model.parameters() if id(p) not in factors)


def record_progress(root: nn.Module, progress: Progress) -> None:
    """Note on an adapted model how far an allocator got."""
    setattr(root, _PROGRESS, progress)


def training_progress(model: nn.Module) -> Progress:
    """How far the allocators of `model` got."""
    progress = getattr(adapter_root(model), _PROGRESS)
    assert isinstance(progress, Progress)
    return progress
