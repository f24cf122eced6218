"""Bottleneck adapters and their places in an encoder or decoder: what `houlsby` and `pfeiffer` share.

An adapter is a child of the projection that ends a sublayer and changes its output through a forward hook. It so
acts in front of the sublayer's dropout and residual connection, and no key of the base model changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..config import AdaLoraConfig
from ..errors import AdapterFileError, ConfigError, InjectionError
from .base import ParameterCount
from .lora import shape_of
from .options import check_counts, check_parameters, resolved
from .ranks import spread
from .trained import head_modules, put_in, read_trained, train_only, trained_count, undone, write_trained

INIT_STD = 1e-2  # Houlsby et al., section 3.6: normal, cut at two standard deviations

# How the projections end that close the attention and the feed-forward sublayer of a numbered layer.
_ATTENTION = (
    r"attention\.output\.dense",  # BERT, RoBERTa, ELECTRA, DeBERTa, ViT
    r"attention\.out_lin",  # DistilBERT
    r"(self_attn|encoder_attn)\.out_proj",  # BART, OPT
    r"self_attn\.o_proj",  # Llama and its like
    r"attn\.c_proj",  # GPT-2
    r"(SelfAttention|EncDecAttention)\.o",  # T5
)
_FEED_FORWARD = (
    r"(?<!attention\.)output\.dense",
    r"ffn\.lin2",
    r"fc2",
    r"mlp\.down_proj",
    r"mlp\.c_proj",
    r"DenseReluDense\.wo",
)
_PLACES = _ATTENTION + _FEED_FORWARD


class Bottleneck(nn.Module):
    """x + U f(D x + d) + u for x (..., width): D (size, width), U (width, size), nearly the identity at first."""

    def __init__(self, width: int, size: int, activation: nn.Module, like: Tensor) -> None:
        super().__init__()
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        self.down = nn.Linear(width, size, device=device, dtype=dtype)
        self.up = nn.Linear(size, width, device=device, dtype=dtype)
        self.activation = activation
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.down(x.to(self.down.weight.dtype)))
        return x + self.up(inner).to(x.dtype)


class BottleneckMethod:
    """Options: bottleneck (width of each adapter) or parameters (size of all), modules_to_save.

    `parameters` takes the largest uniform width that it allows, and one more for single adapters. Raises ConfigError
    for options that cannot be meant, InjectionError for an architecture whose places are not known.
    """

    name: ClassVar[str]
    in_attention: ClassVar[bool]
    activation: ClassVar[type[nn.Module]]
    resumable = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        defaults = {"bottleneck": 16, "modules_to_save": None, "parameters": None}
        self._options = resolved(self.name, defaults, options)
        check_counts(self._options, "bottleneck")
        check_parameters(self._options, "bottleneck")
        AdaLoraConfig(modules_to_save=self._options["modules_to_save"])  # it checks it

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put adapters in, in place; they and the head train."""
        heads, found = self._heads(model), places(model, self.in_attention)
        sizes = self._sizes({name: shape_of(module)[0] for name, module in found.items()})
        for name, size in sizes.items():
            insert(found[name], size, self.activation())
        adapters = {f"{name}.adapter.{key}" for name in found for key in found[name].adapter.state_dict()}  # type: ignore[union-attr]
        train_only(model, adapters, heads)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """None."""
        return []

    def added(self, model: nn.Module) -> list[nn.Parameter]:
        """The bottlenecks."""
        return [p for m in model.modules() if isinstance(m, Bottleneck) for p in m.parameters()]

    def count(self, model: nn.Module) -> ParameterCount:
        """The size never changes."""
        own, head = trained_count(model, self._heads(model))
        return ParameterCount(own, own, head)

    def save(self, model: nn.Module, folder: Path, base: str, task_type: str | None) -> None:
        """What trained."""
        facts = {"base_model_name_or_path": base, "task_type": task_type}
        write_trained(model, folder, self.name, self._heads(model), facts)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """For inference. Raises AdapterFileError, with `base` as it was."""
        tensors, modules = read_trained(folder, self.name), dict(base.named_modules())
        with undone(base):
            for key, value in tensors.items():
                if key.endswith(".adapter.down.weight"):
                    name = key.removesuffix(".adapter.down.weight")
                    # Only these have a place for one, and before its width is known to fit, a size may be anything.
                    width = shape_of(modules[name])[0] if name in modules and _ends(name, _PLACES) else None
                    if value.dim() != 2 or value.shape[1] != width:
                        raise AdapterFileError(
                            f"adapter in {str(folder)!r}: {key!r} has shape {tuple(value.shape)}, and the model has no "
                            f"place {name!r} for it; it was made for another model."
                        )
                    insert(modules[name], len(value), self.activation())
            return put_in(base, tensors, folder)

    def options(self) -> dict[str, Any]:
        """All options, defaults resolved."""
        return dict(self._options)

    def _heads(self, model: nn.Module) -> list[str]:
        return head_modules(model, self._options["modules_to_save"])

    def _sizes(self, widths: Mapping[str, int]) -> dict[str, int]:
        goal = self._options["parameters"]
        if goal is None:
            return dict.fromkeys(widths, self._options["bottleneck"])
        # D, U and d grow with the size; u is there in any case.
        costs = {name: 2 * width + 1 for name, width in widths.items()}
        sizes = spread(costs, goal - sum(widths.values()))
        if min(sizes.values()) < 1:
            least = sum(costs.values()) + sum(widths.values())
            raise ConfigError(f"parameters={goal} is below what adapters of size 1 everywhere need, {least}.")
        return sizes


def places(model: nn.Module, in_attention: bool) -> dict[str, nn.Module]:
    """The projections to put adapters behind, by name, in the order of the model. Raises InjectionError."""
    layers = [(name, module) for name, module in model.named_modules() if re.search(r"\.\d+\.", name)]
    attention = {name: module for name, module in layers if _ends(name, _ATTENTION)}
    feed = {name: module for name, module in layers if _ends(name, _FEED_FORWARD)}
    if not feed or (in_attention and {_layer(name) for name in attention} != {_layer(name) for name in feed}):
        raise InjectionError(
            f"cannot tell where the layers of {type(model).__name__} end their attention ({len(attention)} places) and "
            f"feed-forward parts ({len(feed)} places); known are BERT, RoBERTa, ELECTRA, DeBERTa, DistilBERT, ViT, "
            "BART, OPT, T5, GPT-2, Llama and models built like them."
        )
    wanted = {**feed, **attention} if in_attention else feed
    return {name: module for name, module in layers if name in wanted}


def insert(module: nn.Module, size: int, activation: nn.Module) -> None:
    """Let an adapter change the output of a projection."""
    weight: Any = module.weight
    module.adapter = Bottleneck(shape_of(module)[0], size, activation, weight)
    module.register_forward_hook(_adapt)


def _adapt(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return module.adapter(output)


def _layer(name: str) -> str:
    """The name up to its first number."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name


def _ends(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(rf"(?:^|\.){pattern}$", name) for pattern in patterns)
