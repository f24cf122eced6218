"""Putting adapters into a model and taking them out, and what is asked of a whole adapted model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch import nn

from .config import AdaLoraConfig
from .conversion import convert, restore
from .errors import ConfigError, InjectionError
from .layers import SVDAdapter
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
    config = config or AdaLoraConfig()
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
    _check_budget(config, ranks)
    install(model, config, ranks)
    record_progress(model, Progress(0, config.total_step))
    return model


def install(model: M, config: AdaLoraConfig, ranks: dict[str, int]) -> M:
    """Convert the modules that `ranks` names, each with its capacity, and choose what trains."""
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        convert(modules[name], rank, config.scaling, config.lora_dropout)
    for _, module in saved_modules(model, config):
        module.requires_grad_(True)
    for _, bias in trained_biases(model, config):
        bias.requires_grad_(True)
    setattr(model, _CONFIG, config)
    record_progress(model, Progress(None, config.total_step))
    return model


def eject(model: M) -> M:
    """Remove every adapter from `model` in place: the base model, bit for bit; nothing is made trainable."""
    root = adapter_root(model)
    for _, module in named_adapters(root):
        restore(module)
    delattr(root, _CONFIG)
    delattr(root, _PROGRESS)
    return model


def merge(model: nn.Module) -> None:
    """Add every increment to its base weight. The originals are kept, so `unmerge` is exact.

    Raises InjectionError for a weight that another module shares: it would change there too.
    """
    root = adapter_root(model)
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
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes what the base model does; may be nested."""
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


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should get: everything trainable, each parameter once."""
    return [parameter for parameter in adapter_root(model).parameters() if parameter.requires_grad]


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


def _check_budget(config: AdaLoraConfig, ranks: dict[str, int]) -> None:
    target, least = config.target_r * len(ranks), sum(bound(config.min_rank, name, 0) for name in ranks)
    if not least <= target <= sum(ranks.values()):
        raise ConfigError(
            f"target_r={config.target_r} over {len(ranks)} modules asks for {target} triplets in the end, but "
            f"min_rank and max_rank allow {least} to {sum(ranks.values())}; change target_r or the bounds."
        )
    for name, most in ranks.items():
        if bound(config.min_rank, name, 0) > most:
            raise ConfigError(f"for {name!r} min_rank is {bound(config.min_rank, name, 0)}, above max_rank {most}.")


def adapter_root(model: nn.Module) -> nn.Module:
    """The module that was injected: `model`, or what a wrapper such as DDP holds. Raises InjectionError."""
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


def record_progress(root: nn.Module, progress: Progress) -> None:
    """Note on an adapted model how far an allocator got."""
    setattr(root, _PROGRESS, progress)


def training_progress(model: nn.Module) -> Progress:
    """How far the allocators of `model` got."""
    progress = getattr(adapter_root(model), _PROGRESS)
    assert isinstance(progress, Progress)
    return progress
