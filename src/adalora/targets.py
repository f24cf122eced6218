"""Which modules a configuration means, and which of them cannot be adapted.

Names match as in PEFT: a list entry is a whole name or a dotted ending of it, a string is a regular
expression for the whole name. Here is also every refusal: a module whose weight is read past its forward
would ignore an increment in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .config import ALL_LINEAR, AdaLoraConfig
from .conversion import adapter_type
from .errors import InjectionError
from .layers import SVDAdapter, SVDEmbedding, SVDLinear, embed_scale
from .quantized import overrides_forward_knowingly

Pattern = str | Collection[str] | None


def matches(name: str, pattern: Pattern) -> bool:
    """Whether a module name fits a regular expression (string) or an entry of a list of endings."""
    if pattern is None:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in pattern)


def bound(limits: int | Mapping[str, int] | None, name: str, default: int) -> int:
    """The rank bound of one module: the same for all, or that of the first ending which fits."""
    if isinstance(limits, Mapping):
        return next((value for ending, value in limits.items() if matches(name, [ending])), default)
    return default if limits is None else limits


def find_targets(model: nn.Module, config: AdaLoraConfig) -> dict[str, nn.Module]:
    """Modules to adapt, by name, each once. Raises InjectionError if there is none or one must be refused."""
    wanted = {name: module for name, module in model.named_modules() if name and _selected(name, module, model, config)}
    if not wanted:
        raise InjectionError(_nothing_found(model, config))
    parents = {
        f"{name}.{child}".lstrip("."): parent for name, parent in model.named_modules() for child in parent._modules
    }
    for name, module in wanted.items():
        reason = refusal(module, parents[name])
        if reason:
            raise InjectionError(
                f"cannot adapt {name!r} ({type(module).__name__}): {reason} To leave it out, add it to "
                f"exclude_modules, e.g. exclude_modules=[{name.rpartition('.')[2]!r}]."
            )
    _check_names(model, config, wanted)
    return wanted


def saved_modules(model: nn.Module, config: AdaLoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Modules that train and are stored whole."""
    for name, module in model.named_modules():
        if name and matches(name, config.modules_to_save):
            yield name, module


def _selected(name: str, module: nn.Module, model: nn.Module, config: AdaLoraConfig) -> bool:
    if config.target_modules == ALL_LINEAR:
        kind = adapter_type(type(module))
        linear = kind is not None and (issubclass(kind, SVDLinear) or kind.__name__ == "SVDConv1D")
        if not linear or _is_output_head(module, model):
            return False
    elif not matches(name, config.target_modules):
        return False
    inside_saved = any(matches(part, config.modules_to_save) for part in _ancestors(name))
    return not (inside_saved or matches(name, config.exclude_modules)) and _in_layers(name, config)


def _ancestors(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _is_output_head(module: nn.Module, model: nn.Module) -> bool:
    # transformers' models can tell; elsewhere a head is excluded by naming it.
    getter = getattr(model, "get_output_embeddings", None)
    return getter is not None and getter() is module


def _in_layers(name: str, config: AdaLoraConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None:
        return True
    patterns = config.layers_pattern or (r"[^.]*",)
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:.*\.)?{pattern}\.(\d+)(?:\.|$)", name)
        if found:
            return int(found.group(1)) in ((wanted,) if isinstance(wanted, int) else wanted)
    return False


def refusal(module: nn.Module, parent: nn.Module) -> str | None:
    """Why an increment on this module would fail or be ignored; None if it works."""
    if isinstance(module, SVDAdapter):
        return "it already has an adapter; call adalora.eject(model) first, or attach a new RankAllocator to it."
    kind = adapter_type(type(module))
    if kind is None:
        return "there is an adapter for Linear, Conv1d/2d/3d, Embedding and transformers' Conv1D only."
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        # The second is torch's older way (weight_norm, spectral_norm, prune): computed anew before each forward.
        return "its weight is parametrized; remove the parametrization first."
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "it is lazy and has no weight yet; run one forward pass first."
    if getattr(vars(module).get("_hf_hook"), "offload", False):
        return (
            "accelerate offloads it, and would take the adapter along: new parameters in each forward, which no "
            "optimizer trains. Load the model whole, or in few bits, or accelerate.cpu_offload_with_hook it."
        )
    if "forward" in vars(module):
        return "its forward was replaced on the instance (a device map does that); inject before it."
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight without calling the layer."
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "in evaluation nn.TransformerEncoderLayer reads this weight without calling the layer; switch that "
            "off with torch.backends.mha.set_fastpath_enabled(False) before injecting."
        )
    own = type(module).forward is not kind.base_type.forward
    if own and not _is_scaled_embedding(module) and not overrides_forward_knowingly(type(module)):
        return "its class overrides forward in a way that no adapter knows."
    return _embedding_refusal(module) if isinstance(module, nn.Embedding) else None


def _embedding_refusal(module: nn.Embedding) -> str | None:
    if module.max_norm is not None:
        return "max_norm rewrites the base weight in every forward pass."
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq would scale only a part of the increment's gradient."
    return None


def _is_scaled_embedding(module: nn.Module) -> bool:
    """Whether a subclass of Embedding does nothing but multiply its rows by `embed_scale` (it is tried)."""
    if adapter_type(type(module)) is not SVDEmbedding or not hasattr(module, "embed_scale"):
        return False
    weight: Tensor = module.weight  # type: ignore[assignment]
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)
    with torch.no_grad():
        return torch.equal(module(ids), F.embedding(ids, weight) * embed_scale(module))


def _nothing_found(model: nn.Module, config: AdaLoraConfig) -> str:
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        if name and adapter_type(type(module)) is not None:
            kinds.setdefault(name.rpartition(".")[2], type(module).__name__)
    have = ", ".join(f"{name} ({kind})" for name, kind in list(kinds.items())[:12]) or "none"
    return (
        f"no module of {type(model).__name__} fits target_modules={config.target_modules!r} with "
        f"exclude_modules={config.exclude_modules!r} and layers_to_transform={config.layers_to_transform!r}. "
        f"Modules that can be adapted end in: {have}."
    )


def _check_names(model: nn.Module, config: AdaLoraConfig, wanted: Mapping[str, nn.Module]) -> None:
    """Raise InjectionError for a listed name that means nothing; a regular expression may."""
    everything = [name for name, _ in model.named_modules()]
    for field in ("target_modules", "exclude_modules", "min_rank", "max_rank"):
        value = getattr(config, field)
        names = list(wanted) if field.endswith("rank") else everything
        for ending in value if isinstance(value, Mapping | tuple) else ():
            if not any(matches(name, [ending]) for name in names):
                kind = "adapted module" if field.endswith("rank") else "module"
                endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))
                near = difflib.get_close_matches(ending.rpartition(".")[2], endings, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"they end in: {', '.join(endings[:12])}."
                raise InjectionError(f"{field} names {ending!r}, but no {kind} ends in that; {hint}")
